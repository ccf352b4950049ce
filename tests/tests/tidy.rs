//! The repository tests itself: arrows between crates, names, leftovers, sizes.
#![allow(clippy::unwrap_used)]

use heddle_tests::{root, skip};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Which crate may depend on which of ours: ARCHITECTURE.md draws it.
const ARROWS: [(&str, &[&str]); 7] = [
    ("heddle-proto", &[]),
    ("heddle-replay-engine", &["heddle-proto"]),
    ("heddle-storage", &["heddle-proto"]),
    ("heddle-coordinator", &["heddle-proto", "heddle-storage"]),
    ("heddle-node", &["heddle-proto", "heddle-replay-engine", "heddle-storage"]),
    (
        "heddle-cli",
        &["heddle-proto", "heddle-replay-engine", "heddle-storage", "heddle-coordinator", "heddle-node"],
    ),
    (
        "heddle-tests",
        &[
            "heddle-proto",
            "heddle-replay-engine",
            "heddle-storage",
            "heddle-coordinator",
            "heddle-node",
            "heddle-cli",
        ],
    ),
];

/// What a crate must not know, as packages it may not depend on.
const ABSENT: [(&str, &[&str]); 3] = [
    ("heddle-replay-engine", &["tokio", "tonic", "sled", "raft"]),
    ("heddle-proto", &["tokio", "sled", "raft"]),
    ("heddle-coordinator", &["sled", "raft"]),
];

fn dependencies() -> BTreeMap<String, Vec<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_string();
    let packages = metadata["packages"].as_array().unwrap().iter();
    packages
        .map(|package| {
            let normal = package["dependencies"].as_array().unwrap().iter().filter(|d| d["kind"].is_null());
            (text(&package["name"]), normal.map(|d| text(&d["name"])).collect())
        })
        .collect()
}

#[test]
fn dependencies_point_one_way() {
    let dependencies = dependencies();
    assert_eq!(dependencies.len(), ARROWS.len(), "a crate is missing from ARROWS");
    for (name, allowed) in ARROWS {
        let ours = dependencies[name].iter().filter(|d| d.starts_with("heddle-"));
        for arrow in ours {
            assert!(allowed.contains(&arrow.as_str()), "{name} may not depend on {arrow}");
        }
    }
    for (name, absent) in ABSENT {
        for package in absent {
            assert!(!dependencies[name].iter().any(|d| d == package), "{name} may not know {package}");
        }
    }
}

fn sources(dir: &Path, into: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            sources(&path, into);
        } else if path.extension().is_some_and(|e| e == "rs") {
            into.push(path);
        }
    }
}

#[test]
fn every_file_says_what_it_is_and_leaves_nothing_open() {
    let mut files = vec![];
    sources(&root(), &mut files);
    assert!(files.len() > 50, "the sources were not found");
    let open = ["todo", "unimplemented", "dbg"].map(|word| format!("{word}!("));
    for path in files {
        let text = std::fs::read_to_string(&path).unwrap();
        let name = path.strip_prefix(root()).unwrap().display().to_string();
        assert!(text.starts_with("//!"), "{name} does not begin with a //! line");
        let lines = text.lines().count();
        assert!(lines <= 620, "{name} has {lines} lines: which second noun hides in it?");
        for word in &open {
            assert!(!text.contains(word), "{name} contains {word}");
        }
    }
}

#[test]
fn the_map_names_every_crate() {
    let map = std::fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    for (name, _) in ARROWS {
        let folder = name.strip_prefix("heddle-").unwrap();
        assert!(map.contains(&format!("`{folder}`")), "ARCHITECTURE.md does not name {folder}");
    }
}

#[test]
fn the_bundled_guests_rebuild_to_the_same_bytes() {
    if Command::new("riscv64-unknown-elf-gcc").arg("--version").output().is_err() {
        return skip("riscv64-unknown-elf-gcc is not installed");
    }
    let dir = tempfile::tempdir().unwrap();
    let guest = root().join("replay-engine/guest");
    let scripts = [
        ("build", dir.path().join("loom.elf")),
        ("build-tick", dir.path().into()),
        ("build-bench", dir.path().join("bench.bin")),
    ];
    for (script, out) in scripts {
        assert!(Command::new(guest.join(script)).arg(out).status().unwrap().success());
    }
    for name in ["loom.elf", "tick.elf", "tick-riscv.elf", "bench.bin"] {
        let same = std::fs::read(dir.path().join(name)).unwrap() == std::fs::read(guest.join(name)).unwrap();
        assert!(same, "guest/{name} is not what its script makes");
    }
}
