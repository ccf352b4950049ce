//! The main job under kill -9: of the leader, a follower, the recorder, the
//! coordinator, a node; and without a store for a while.
#![allow(clippy::unwrap_used)]

use heddle_proto::{Manifest, v1};
use heddle_tests::{Processes, until};
use serde_json::Value;
use std::process::Stdio;
use tokio::process::{Child, Command};

const NAME: &str = "guest";

fn record(p: &Processes, more: &[&str]) -> Child {
    let mut command: Command = p.command().into();
    command
        .args(["record", "builtin", "--name", NAME, "--snapshot-every", "20000000", "-o", "json"])
        .args(more);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

async fn finished(child: Child) -> Value {
    let output = child.wait_with_output().await.unwrap();
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{err}");
    serde_json::from_slice(&output.stdout).unwrap()
}

async fn replays(p: &Processes, spans: &str) -> Value {
    p.heddle(&["replay", NAME, "--spans", spans, "-o", "json"]).await.expect(0).json()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_leader_and_a_follower_die_while_recording() {
    let mut p = Processes::start(2, 3000).await;
    let recorder = record(&p, &[]);
    p.committed(NAME, 10_000_000).await;
    let leader = p.leader().await;
    let follower = if leader == "replica-1" { "replica-2" } else { "replica-1" };
    p.cluster.kill(follower).await.unwrap();
    let before = p.committed(NAME, 30_000_000).await;
    p.cluster.start_part(follower).unwrap();
    let acknowledged = p.committed(NAME, before.committed_icount + 1).await;
    assert_eq!(acknowledged.state, "recording", "the leader is to die in the middle of it");
    p.cluster.kill(&leader).await.unwrap();
    let done = finished(recorder).await;
    p.cluster.start_part(&leader).unwrap();
    until("the old leader to follow", async || {
        let replicas = p.client.store.replicas().await;
        let old = replicas.iter().find(|r| format!("replica-{}", r.id) == leader)?;
        (old.role == "follower" && old.applied > 0).then_some(())
    })
    .await;
    let row = p.row(NAME).await.unwrap();
    assert_eq!(row.state, "sealed");
    assert!(row.committed_events >= acknowledged.committed_events);
    assert_eq!(row.committed_events, done["events"].as_u64().unwrap());
    let replay = replays(&p, "6").await;
    assert_eq!(replay["verdict"], "match");
    assert_eq!(replay["digest"], done["digest"]);
    assert_eq!(replay["instructions"], done["instructions"]);
    assert_eq!(replay["role_mismatches"], 0);
    p.cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_recorder_dies_and_the_durable_prefix_replays() {
    let p = Processes::start(2, 800).await;
    let mut recorder = record(&p, &[]);
    let acknowledged = p.committed(NAME, 60_000_000).await;
    recorder.kill().await.unwrap();
    let cut =
        until("the recording to be cut", async || p.row(NAME).await.filter(|row| row.state == "cut")).await;
    assert!(cut.committed_events >= acknowledged.committed_events);
    for spans in ["1", "3"] {
        let replay = replays(&p, spans).await;
        assert_eq!(replay["verdict"], "match", "{replay}");
        assert_eq!(replay["events"], cut.committed_events);
        assert_eq!(replay["instructions"], cut.committed_icount);
    }
    // The outbox that was left behind comes too late: it is refused, and kept aside.
    let more = p.heddle(&["record", "builtin", "--name", "second", "-o", "json"]).await.expect(0);
    assert!(more.err.contains(".refused is kept"), "{}", more.err);
    assert_eq!(p.row(NAME).await.unwrap().committed_events, cut.committed_events);
    p.cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_store_is_away_and_the_guest_pauses_rather_than_lose_an_event() {
    let mut p = Processes::start(1, 60_000).await;
    // Room for one chunk: the guest has to pause as soon as the store is away.
    let recorder = record(&p, &["--outbox-bytes", "1K"]);
    p.committed(NAME, 20_000_000).await;
    for replica in 1..=3 {
        p.cluster.kill(&format!("replica-{replica}")).await.unwrap();
    }
    // Whatever the guest does meanwhile, its outbox stays within its bound and it does not end.
    let outbox = until("the outbox to be full", async || {
        let entries = std::fs::read_dir(p.cluster.dir().join("outbox")).ok()?;
        entries.filter_map(|e| e.ok()).find(|e| e.metadata().is_ok_and(|m| m.len() > 500)).map(|e| e.path())
    })
    .await;
    for replica in 1..=3 {
        p.cluster.start_part(&format!("replica-{replica}")).unwrap();
    }
    let done = finished(recorder).await;
    assert!(!outbox.exists(), "an outbox is removed once all of it is committed and sealed");
    let replay = replays(&p, "2").await;
    assert_eq!(replay["verdict"], "match");
    assert_eq!(replay["digest"], done["digest"]);
    p.cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_coordinator_and_a_node_die_in_the_middle_of_a_job() {
    let mut p = Processes::start(2, 800).await;
    let done = finished(record(&p, &[])).await;
    let row = p.row(NAME).await.unwrap();
    let id = Manifest::decode(&row.manifest).unwrap().id;
    let mut coordinator = p.client.coordinator.clone();
    let request = v1::SubmitRequest {
        id: "j1".into(),
        kind: "replay".into(),
        recording: id.to_vec().into(),
        spans: 3,
        against: String::new(),
        ..Default::default()
    };
    coordinator.submit(request.clone()).await.unwrap();
    let job = async |state: &str| {
        let jobs = p.client.coordinator.clone().jobs(v1::JobsRequest { id: "j1".into() }).await.ok()?;
        let job = jobs.into_inner().jobs.into_iter().next()?;
        job.tasks.iter().any(|task| task.state == state).then_some(job)
    };
    let leased = until("a span to be leased", async || job("leased").await).await;
    let node = leased.tasks.iter().find(|task| task.state == "leased").unwrap().node.clone();
    p.cluster.kill(&node).await.unwrap();
    p.cluster.kill("coordinator").await.unwrap();
    p.cluster.start_part("coordinator").unwrap();
    p.cluster.start_part(&node).unwrap();
    let ended = until("the job to end", async || {
        let jobs = p.client.coordinator.clone().jobs(v1::JobsRequest { id: "j1".into() }).await.ok()?;
        jobs.into_inner().jobs.into_iter().find(|job| job.state != "running")
    })
    .await;
    assert_eq!(ended.outcome, "match");
    assert!(ended.tasks.iter().any(|task| task.attempt > 1), "the killed node's span was done again");
    // The same submission again is the same job, with the same verdict.
    until("the coordinator to answer", async || {
        p.client.coordinator.clone().submit(request.clone()).await.ok()
    })
    .await;
    let jobs = p.heddle(&["get", "jobs", "-o", "json"]).await.expect(0).json();
    assert_eq!(jobs.as_array().unwrap().len(), 1);
    assert_eq!(jobs[0]["outcome"], "match");
    assert!(done["instructions"].as_u64().unwrap() >= 200_000_000);
    p.cluster.stop().await;
}
