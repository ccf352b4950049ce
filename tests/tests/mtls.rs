//! Mutual TLS between real processes: who has no certificate of the cluster's authority gets
//! no word out of it.
#![allow(clippy::unwrap_used)]

use heddle_cli::local::{LocalCluster, LocalConfig, TLS_DIR};
use heddle_tests::{program, run, three_replicas};
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

async fn heddle(args: &[&str]) -> heddle_tests::Said {
    let mut command = Command::new(program());
    command.args(args);
    tokio::task::spawn_blocking(move || run(&mut command, b"")).await.unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_with_mutual_tls_works_and_is_closed_to_others() {
    let dir = TempDir::new().unwrap();
    let tls = dir.path().join(TLS_DIR);
    let config = LocalConfig { nodes: 1, tls: Some(tls.clone()), ..three_replicas(dir.path()) };
    let mut cluster = LocalCluster::start(config).await.unwrap();
    let in_dir = ["--cluster", text(dir.path())];
    heddle(&[&in_dir[..], &["record", "builtin", "--name", "guest"]].concat()).await.expect(0);
    heddle(&[&in_dir[..], &["replay", "guest"]].concat()).await.expect(0);
    // A part that comes back is let in again, and one that is new joins.
    cluster.kill("replica-2").await.unwrap();
    cluster.start_part("replica-2").unwrap();
    let (_, url) = cluster.add_replica(1).unwrap();
    heddle(&[&in_dir[..], &["replica", "add", &format!("4={url}")]].concat()).await.expect(0);

    let coordinator = cluster.file().coordinator;
    assert!(coordinator.starts_with("https://"), "{coordinator}");
    let get = ["get", "recordings"];
    let get_with = async |tls: &Path| {
        heddle(&[&["--tls", text(tls), "--cluster", &coordinator], &get[..]].concat()).await
    };
    get_with(&tls).await.expect(0);
    // No credentials; in clear; of another authority.
    let said = heddle(&[&["--cluster", &coordinator], &get[..]].concat()).await.expect(2);
    assert!(said.err.contains("--tls DIR"), "{}", said.err);
    let in_clear = coordinator.replace("https", "http");
    let said = heddle(&[&["--cluster", &in_clear], &get[..]].concat()).await.expect(7);
    assert!(said.err.contains("https://"), "{}", said.err);
    let (authority, other) = (dir.path().join("other-authority"), dir.path().join("other"));
    heddle(&["certificate", "--authority", text(&authority), text(&other)]).await.expect(0);
    let said = get_with(&other).await.expect(7);
    assert!(said.err.contains("certificate"), "{}", said.err);
    // Ours by its authority's file, so that only the server can refuse it.
    std::fs::copy(tls.join("ca.pem"), other.join("ca.pem")).unwrap();
    get_with(&other).await.expect(7);
    // A part with credentials does not talk in clear.
    let args =
        ["--tls", text(&tls), "serve", "coordinator", "--listen", "127.0.0.1:0", "--replica", &in_clear];
    let said = heddle(&args).await.expect(2);
    assert!(said.err.contains("in clear"), "{}", said.err);
    // A file that is none.
    std::fs::write(other.join("key.pem"), b"nothing").unwrap();
    let said = get_with(&other).await.expect(2);
    assert!(said.err.contains("key.pem"), "{}", said.err);
    cluster.stop().await;
}
