//! Planted defects, every one found; and a match again and again under load.
#![allow(clippy::unwrap_used)]

use heddle_replay_engine::schedule::Seeded;
use heddle_replay_engine::{BUILTIN, Build, Fault};
use heddle_tests::{Processes, count};
use std::process::{Command, Stdio};

#[tokio::test(flavor = "multi_thread")]
async fn every_planted_defect_is_found_or_shown_masked() {
    let p = Processes::start(2, 10_000).await;
    let recorded = p
        .heddle(&["record", "builtin", "--name", "guest", "--snapshot-every", "20000000", "-o", "json"])
        .await
        .expect(0);
    let end = recorded.json()["instructions"].as_u64().unwrap();
    let (mut exact, mut masked) = (0, 0);
    let first = std::env::var("HEDDLE_SEED").ok().and_then(|s| s.parse::<u64>().ok());
    let seeds = first.map_or(1..count(8, 100) + 1, |seed| seed..seed + 1);
    for seed in seeds {
        let mut rng = Seeded::new(seed);
        let fault =
            Fault { icount: 1 + rng.below(end), register: 1 + rng.below(31) as u8, bit: rng.below(64) as u8 };
        let build = Build { fault: Some(fault) }.to_string();
        let hunt = p.heddle(&["hunt", "guest", "--against", &build, "--timeout", "120", "-o", "json"]).await;
        assert_eq!(hunt.code, 3, "HEDDLE_SEED={seed} {fault:?}: {} {}", hunt.out, hunt.err);
        let card = hunt.json();
        assert_eq!(card["finding"]["icount"], fault.icount, "HEDDLE_SEED={seed} {fault:?}: {card}");
        assert!(!card["finding"]["instruction"].as_str().unwrap().is_empty());
        if card["finding"]["masked"].is_null() {
            assert_eq!(card["repeated"]["same"], true, "HEDDLE_SEED={seed}");
            exact += 1;
        } else {
            assert_eq!(card["finding"]["masked"]["from"], fault.icount, "HEDDLE_SEED={seed}");
            masked += 1;
        }
    }
    println!("{exact} found exactly, {masked} shown masked, against {BUILTIN}");
    p.cluster.stop().await;
}

/// Kills what it started, however the test ends.
struct Load(std::process::Child);

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_match_every_time_under_load() {
    let p = Processes::start(2, 20_000).await;
    // Both cores are busy while recording and while replaying.
    let load = Command::new("stress").args(["--cpu", "2", "--timeout", "900"]).stdout(Stdio::null()).spawn();
    let _load = Load(load.expect("apt install stress"));
    let recorded = p
        .heddle(&["record", "builtin", "--name", "guest", "--snapshot-every", "20000000", "-o", "json"])
        .await
        .expect(0)
        .json();
    let replays = count(4, 50);
    let mut ends = std::collections::HashSet::new();
    for _ in 0..replays {
        let replay = p.heddle(&["replay", "guest", "--spans", "6", "-o", "json"]).await.expect(0).json();
        assert_eq!(replay["verdict"], "match");
        // A span matches only if the digest at its end, where a snapshot stands, is equal.
        let digests: Vec<String> =
            replay["spans"].as_array().unwrap().iter().map(|s| s["digest"].to_string()).collect();
        assert_eq!(digests.len(), 6);
        ends.insert(digests.join(" "));
        assert_eq!(replay["digest"], recorded["digest"]);
    }
    assert_eq!(ends.len(), 1, "digests at the snapshots differ between replays");
    println!("{replays} replays under load: {replays} matches");
    p.cluster.stop().await;
}
