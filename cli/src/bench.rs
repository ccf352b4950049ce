//! `heddle bench`: figures as ratios against a named peer in the same run.

mod cost;
pub mod machine;
mod peers;
pub mod qemu;
pub mod store;

use crate::args::Format;
use crate::local::{DEFAULT_SHARDS, LocalCluster, LocalConfig};
use crate::output;
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// The rows of a benchmark.
#[derive(Default)]
pub struct Rows(Vec<Value>);

impl Rows {
    /// A row: ours against a peer, and whether the ratio keeps to the target, which begins
    /// with `<=` or `>=` if it is one.
    pub fn row(&mut self, name: &str, ours: f64, peer: &str, peer_value: f64, unit: &str, target: &str) {
        let ratio = ours / peer_value.max(1e-9);
        let bound = target.split_whitespace().nth(1).and_then(|bound| bound.parse::<f64>().ok());
        let holds = bound.map(|bound| if target.starts_with("<=") { ratio <= bound } else { ratio >= bound });
        eprintln!("  {name}: {ours:.2} {unit}, {peer} {peer_value:.2}: {ratio:.2} ({target})");
        self.0.push(json!({
            "name": name, "ours": ours, "peer": peer, "peer_value": peer_value, "unit": unit,
            "ratio": ratio, "target": target, "holds": holds,
        }));
    }

    /// A row without its peer, and why.
    pub fn without(&mut self, name: &str, peer: &str, target: &str, why: &str) {
        eprintln!("  {name}: {peer}: {why}");
        self.0.push(json!({
            "name": name, "ours": null, "peer": peer, "peer_value": null, "unit": null,
            "ratio": null, "target": target, "holds": null, "reason": why,
        }));
    }

    /// Prints all rows.
    pub fn print(self, bench: &str, format: Format) -> Result<()> {
        let value = json!({ "bench": bench, "rows": self.0 });
        match format {
            Format::Json | Format::Yaml => output::value(format, &value),
            _ => output::value(Format::Yaml, &value),
        }
    }
}

/// Three replicas, a coordinator and so many nodes, in processes of their own.
async fn start_cluster(dir: &Path, nodes: u64) -> Result<LocalCluster> {
    LocalCluster::start(LocalConfig {
        program: std::env::current_exe().context("find this program")?,
        dir: dir.into(),
        replicas: 3,
        nodes,
        slots: 1,
        lease_ms: 20_000,
        offers_planted: false,
        qemu: vec![],
        shards: DEFAULT_SHARDS,
        tls: None,
        environment: BTreeMap::new(),
    })
    .await
}
