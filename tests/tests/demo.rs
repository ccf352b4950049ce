//! The demo, as a stranger runs it.
#![allow(clippy::unwrap_used)]

use heddle_tests::{count, program, run};
use std::process::{Command, Stdio};

fn processes_named(word: &str) -> usize {
    let entries = std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok());
    entries
        .filter(|entry| {
            std::fs::read(entry.path().join("cmdline"))
                .is_ok_and(|line| String::from_utf8_lossy(&line).contains(word))
        })
        .count()
}

#[test]
fn the_demo_tells_the_whole_story() {
    for seed in 1..=count(2, 10) {
        let dir = tempfile::tempdir().unwrap();
        let keep = dir.path().join("kept");
        let mut demo = Command::new(program());
        demo.args(["demo", "-o", "json", "--seed", &seed.to_string(), "--keep"]).arg(&keep);
        let said = run(&mut demo, b"").expect(0);
        let story = said.json();
        assert_eq!(story["verdict"], "match", "{}", said.err);
        assert!(story["instructions"].as_u64().unwrap() >= 200_000_000);
        assert_eq!((story["replicas"].as_u64(), story["nodes"].as_u64()), (Some(3), Some(2)));
        for key in [
            "recording",
            "events",
            "chunks",
            "bytes_raw",
            "bytes_stored",
            "replay_serial_s",
            "replay_parallel_s",
        ] {
            assert!(!story[key].is_null(), "{key} is missing");
        }
        let start = &story["checkpoints"]["clock-warp-start"];
        assert!(start["iothread"].as_u64().unwrap() > 0 && start["vcpu"].is_null(), "{start}");
        assert!(story["checkpoints"]["clock-warp-account"]["iothread"].is_null());
        assert_eq!(story["killed"].as_array().unwrap().len(), 2);
        let spans = story["spans"].as_array().unwrap();
        let nodes: std::collections::HashSet<_> = spans.iter().map(|s| s["node"].as_str().unwrap()).collect();
        assert!(spans.len() >= 6 && nodes.len() == 2);
        assert!(spans.iter().all(|s| s["verdict"] == "match" && s["role_mismatches"] == 0));
        let found = &story["found"];
        let at = found["masked"]["from"].as_u64().or(found["icount"].as_u64());
        assert_eq!(at, story["planted"]["icount"].as_u64());
        assert!(keep.join("replica-1/journal").exists(), "--keep keeps the data");
        assert_eq!(processes_named(keep.to_str().unwrap()), 0, "no process is left");
    }
}

#[test]
fn an_interrupted_demo_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let keep = dir.path().join("kept");
    let mut demo = Command::new(program());
    demo.args(["demo", "--keep"]).arg(&keep).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = demo.spawn().unwrap();
    let mut story = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    std::io::BufRead::read_line(&mut story, &mut line).unwrap();
    assert!(line.contains("cluster"), "{line}");
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(processes_named(keep.to_str().unwrap()), 0, "no process is left");
}
