//! `heddle demo`: the whole way, on real processes, as a short story.

mod story;

use crate::args::{Demo, Format};
use crate::cluster::Cluster;
use crate::commands::hunt::card;
use crate::commands::recordings;
use crate::commands::replay::{new_job_id, run_job, summary};
use crate::exit::{OK, UNEXPECTED};
use crate::local::{DEFAULT_SHARDS, LocalCluster, LocalConfig};
use crate::output;
use anyhow::{Context, Result, bail, ensure};
use heddle_proto::event::KIND_NAMES;
use heddle_proto::v1;
use heddle_replay_engine::{BUILTIN, Build, Fault};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::{Duration, Instant};
use story::Story;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

const NAME: &str = "demo";
const SNAPSHOT_EVERY: &str = "20000000";
const SPANS: u32 = 8;
/// Short, so that the demo does not wait long for a killed node's lease.
const LEASE_MS: u64 = 1500;
/// The leader is killed once so much of the guest is committed.
const KILL_AT_ICOUNT: u64 = 60_000_000;
/// Nothing in the demo takes this long.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs the demo; cleans up all it started, also after Ctrl-C.
pub async fn run(command: Demo, format: Format) -> Result<u8> {
    let temporary =
        tempfile::Builder::new().prefix("heddle-demo-").tempdir().context("make a temporary directory")?;
    let dir = command.keep.clone().unwrap_or_else(|| temporary.path().to_path_buf());
    let is_json = matches!(format, Format::Json | Format::Yaml);
    let mut story = Story::new(is_json);
    let program = std::env::current_exe().context("find this program")?;
    let config = LocalConfig {
        program,
        dir,
        replicas: 3,
        nodes: 2,
        slots: 1,
        lease_ms: LEASE_MS,
        offers_planted: true,
        qemu: vec![],
        shards: DEFAULT_SHARDS,
        tls: None,
        environment: BTreeMap::new(),
    };
    // One future for the whole demo: a Ctrl-C between two waits must not be lost.
    let stop = crate::serve::asked_to_stop();
    tokio::pin!(stop);
    let mut demo = tokio::select! {
        started = LocalCluster::start(config) => Demonstration { cluster: started?, result: json!({}) },
        () = &mut stop => return Ok(130),
    };
    // Dropping the cluster kills its processes, and the directory goes with it.
    let done = tokio::select! {
        done = demo.tell(&mut story, command.seed) => done,
        () = &mut stop => {
            demo.cluster.stop().await;
            eprintln!("heddle: interrupted; everything that was started is stopped");
            return Ok(130);
        }
    };
    if let Err(error) = &done {
        let ended = demo.cluster.ended().map(|(_, why)| why).unwrap_or_default();
        eprintln!("heddle: the demo failed: {error:#} {ended}");
    }
    demo.cluster.stop().await;
    done?;
    if is_json {
        output::value(format, &demo.result)?;
    }
    let is_found = demo.result["verdict"] == "match" && !demo.result["found"].is_null();
    Ok(if is_found { OK } else { UNEXPECTED })
}

struct Demonstration {
    cluster: LocalCluster,
    result: Value,
}

impl Demonstration {
    async fn tell(&mut self, story: &mut Story, seed: u64) -> Result<()> {
        let client = Cluster::in_dir(self.cluster.dir())?;
        self.result["replicas"] = json!(3);
        self.result["nodes"] = json!(2);
        story.say("cluster", "3 replicas, 1 coordinator, 2 nodes: six processes on loopback");
        self.record(story, &client).await?;
        self.replays(story, &client).await?;
        self.kill_a_node(story, &client).await?;
        self.hunt(story, &client, seed).await?;
        story.end();
        Ok(())
    }

    /// Records the bundled guest, types at it, and kills the leader meanwhile.
    async fn record(&mut self, story: &mut Story, client: &Cluster) -> Result<()> {
        let began = Instant::now();
        let mut recorder = Command::new(std::env::current_exe()?)
            .args(["record", "builtin", "--name", NAME, "--snapshot-every", SNAPSHOT_EVERY, "-o", "json"])
            .arg("--cluster")
            .arg(self.cluster.dir())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .process_group(0)
            .spawn()
            .context("start the recorder")?;
        let mut keyboard = recorder.stdin.take().context("the recorder's input")?;
        keyboard.write_all(b"weave ").await?;
        committed(client, 20_000_000).await?;
        keyboard.write_all(b"and unweave\n").await?;
        let at = committed(client, KILL_AT_ICOUNT).await?;
        let leader = leader(client).await?;
        self.cluster.kill(&leader).await?;
        story.say(
            "killed",
            &format!(
                "{leader}, the leader, with kill -9 while recording, {} instructions in",
                output::grouped(at)
            ),
        );
        let done = tokio::time::timeout(PATIENCE, recorder.wait_with_output())
            .await
            .context("the recorder hangs")??;
        drop(keyboard);
        ensure!(done.status.success(), "the recorder failed: {}", done.status);
        let recorded: Value = serde_json::from_slice(&done.stdout).context("read the recorder's answer")?;
        self.cluster.start_part(&leader)?;
        let recording = recordings::find(&client.store, NAME).await?;
        let row = &recording.row;
        ensure!(row.state == "sealed", "the recording is {}", row.state);
        let events = recordings::events(&client.store, recording.id()).await?;
        self.result["recording"] = json!(recording.id());
        self.result["instructions"] = recorded["instructions"].clone();
        self.result["events"] = json!(row.committed_events);
        self.result["checkpoints"] = by_role(&events);
        self.result["chunks"] = json!(row.chunks);
        self.result["bytes_raw"] = json!(row.bytes_raw);
        self.result["bytes_stored"] = json!(row.bytes_stored);
        self.result["killed"] = json!([{ "process": leader, "during": "recording" }]);
        story.say(
            "recorded",
            &format!(
                "{} instructions, {} events, {} snapshots in {:.1} s; the log is {} in {} chunks ({} raw)",
                output::grouped(recorded["instructions"].as_u64().unwrap_or(0)),
                output::grouped(row.committed_events),
                row.snapshots.len(),
                began.elapsed().as_secs_f64(),
                output::bytes(row.bytes_stored),
                row.chunks,
                output::bytes(row.bytes_raw),
            ),
        );
        story.say("committed", &format!(
            "{} of {} events on a majority's disks before they were acknowledged; {leader} is started again",
            output::grouped(row.committed_events), output::grouped(recorded["events"].as_u64().unwrap_or(0))
        ));
        Ok(())
    }

    async fn replay(&self, client: &Cluster, spans: u32) -> Result<(v1::JobRow, Value)> {
        let recording = recordings::find(&client.store, NAME).await?;
        let request = v1::SubmitRequest {
            id: new_job_id("replay"),
            kind: "replay".into(),
            recording: recording.id().to_vec().into(),
            spans,
            against: String::new(),
            ..Default::default()
        };
        let began = Instant::now();
        let job = run_job(client, request, Some(PATIENCE.as_secs()), Format::Name).await?;
        let value = summary(&job, began.elapsed().as_secs_f64())?;
        ensure!(job.outcome == "match", "the replay did not match: {}", value["divergence"]);
        Ok((job, value))
    }

    /// Whole on one node, then in spans on both.
    async fn replays(&mut self, story: &mut Story, client: &Cluster) -> Result<()> {
        let (job, whole) = self.replay(client, 1).await?;
        let roles = format!(
            "{} events each on its recorded role, {} on another",
            output::grouped(whole["role_checked"].as_u64().unwrap_or(0)),
            whole["role_mismatches"]
        );
        story.say(
            "replayed",
            &format!("whole on {} in {:.2} s: match; {roles}", job.tasks[0].node, seconds(&whole)),
        );
        let (job, parallel) = self.replay(client, SPANS).await?;
        let mut share: BTreeMap<&str, u32> = BTreeMap::new();
        job.tasks.iter().for_each(|task| *share.entry(&task.node).or_default() += 1);
        let share: Vec<String> = share.iter().map(|(node, count)| format!("{count} on {node}")).collect();
        ensure!(whole["digest"] == parallel["digest"], "whole and spans end in different digests");
        story.say(
            "replayed",
            &format!(
                "in {} spans ({}) in {:.2} s: match, {:.2} of the time, the same final digest {}",
                job.tasks.len(),
                share.join(", "),
                seconds(&parallel),
                seconds(&parallel) / seconds(&whole),
                &parallel["digest"].as_str().unwrap_or_default()[..8]
            ),
        );
        self.result["spans"] = parallel["spans"].clone();
        self.result["verdict"] = parallel["verdict"].clone();
        self.result["replay_serial_s"] = whole["seconds"].clone();
        self.result["replay_parallel_s"] = parallel["seconds"].clone();
        Ok(())
    }

    /// A node dies in the middle of a span, and the other one does it.
    async fn kill_a_node(&mut self, story: &mut Story, client: &Cluster) -> Result<()> {
        let recording = recordings::find(&client.store, NAME).await?;
        let id = new_job_id("replay");
        let request = v1::SubmitRequest {
            id: id.clone(),
            kind: "replay".into(),
            recording: recording.id().to_vec().into(),
            spans: 2,
            against: String::new(),
            ..Default::default()
        };
        let began = Instant::now();
        let waiting = run_job(client, request, Some(PATIENCE.as_secs()), Format::Name);
        let killing = async {
            let node = leased_node(client, &id).await?;
            self.cluster.kill(&node).await?;
            Ok::<String, anyhow::Error>(node)
        };
        let (job, node) = tokio::join!(waiting, killing);
        let (job, node) = (job?, node?);
        let again = job.tasks.iter().position(|task| task.attempt > 1);
        ensure!(job.outcome == "match", "the replay did not match after a node was killed");
        let again = again.with_context(|| format!("{node} was killed, and no span was done again"))?;
        story.say("killed", &format!(
            "{node} in the middle of span {again}: its lease expired, {} did it; match after {:.1} s; {node} is started again",
            job.tasks[again].node, began.elapsed().as_secs_f64()
        ));
        if let Some(killed) = self.result["killed"].as_array_mut() {
            killed.push(
                json!({ "process": node, "during": "span", "span": again, "done_by": job.tasks[again].node }),
            );
        }
        self.cluster.start_part(&node)?;
        crate::cluster::wait_ready(&self.cluster.file(), 2, PATIENCE).await
    }

    /// Plants a defect in another build, and hunts it.
    async fn hunt(&mut self, story: &mut Story, client: &Cluster, seed: u64) -> Result<()> {
        let end = self.result["instructions"].as_u64().context("no instructions recorded")?;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let fault = Fault {
            icount: rng.gen_range(1..=end),
            register: rng.gen_range(1..=31),
            bit: rng.gen_range(0..64),
        };
        let build = Build { fault: Some(fault) };
        let name = heddle_replay_engine::machine::disasm::register_name(usize::from(fault.register));
        let what = format!("bit {} of {name} flips", fault.bit);
        story.say(
            "planted",
            &format!("build {build}: {what} after {} instructions", output::grouped(fault.icount)),
        );
        let recording = recordings::find(&client.store, NAME).await?;
        let request = v1::SubmitRequest {
            id: new_job_id("hunt"),
            kind: "hunt".into(),
            recording: recording.id().to_vec().into(),
            spans: 0,
            against: build.to_string(),
            ..Default::default()
        };
        let began = Instant::now();
        let job = run_job(client, request, Some(PATIENCE.as_secs()), Format::Name).await?;
        let card = card(&job, began.elapsed().as_secs_f64());
        story.card(&crate::commands::hunt::text(&card, NAME));
        let finding = &card["finding"];
        if finding.is_null() {
            bail!("the planted defect was not found");
        }
        self.result["planted"] = json!({ "icount": fault.icount, "what": what });
        let mut found = finding.clone();
        found["replayed_instructions"] = card["replayed_instructions"].clone();
        if found["masked"].is_null() {
            found.as_object_mut().context("the finding")?.remove("masked");
        }
        self.result["found"] = found;
        let verdict = if finding["icount"] == fault.icount {
            "found at its exact instruction"
        } else {
            "found elsewhere than planted"
        };
        ensure!(finding["icount"] == fault.icount, "the defect was {verdict}");
        story.say(
            "found",
            &format!(
                "{verdict}, icount {}, in {:.1} s against {BUILTIN}",
                output::grouped(fault.icount),
                began.elapsed().as_secs_f64()
            ),
        );
        Ok(())
    }
}

fn seconds(value: &Value) -> f64 {
    value["seconds"].as_f64().unwrap_or(0.0)
}

/// Checkpoints by kind and role.
fn by_role(events: &[heddle_proto::Event]) -> Value {
    let mut counts: BTreeMap<&str, BTreeMap<String, u64>> = BTreeMap::new();
    for event in events.iter().filter(|e| matches!(e.body, heddle_proto::Body::Checkpoint(_))) {
        let kind = KIND_NAMES[usize::from(event.body.code())];
        *counts.entry(kind).or_default().entry(event.role.to_string()).or_default() += 1;
    }
    json!(counts)
}

/// Waits until so many instructions of the recording are committed.
async fn committed(client: &Cluster, icount: u64) -> Result<u64> {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Ok(recording) = recordings::find(&client.store, NAME).await {
            let row = &recording.row;
            ensure!(row.state == "recording", "the guest ended before {icount} instructions");
            if row.committed_icount >= icount {
                return Ok(row.committed_icount);
            }
        }
        ensure!(Instant::now() < until, "nothing more is committed");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn leader(client: &Cluster) -> Result<String> {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(leader) = client.store.replicas().await.iter().find(|replica| replica.role == "leader") {
            return Ok(format!("replica-{}", leader.id));
        }
        ensure!(Instant::now() < until, "the store has no leader");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The node that has begun a span of the job.
async fn leased_node(client: &Cluster, job: &str) -> Result<String> {
    let until = Instant::now() + PATIENCE;
    loop {
        let request = v1::JobsRequest { id: job.into() };
        if let Ok(reply) = client.coordinator.clone().jobs(request).await
            && let Some(job) = reply.into_inner().jobs.first()
        {
            ensure!(job.state == "running", "the job ended before a node could be killed");
            if let Some(task) = job.tasks.iter().find(|task| task.state == "leased") {
                // Well into the span, which takes some hundred milliseconds.
                tokio::time::sleep(Duration::from_millis(60)).await;
                return Ok(task.node.clone());
            }
        }
        ensure!(Instant::now() < until, "no node takes a span");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
