//! `heddle bench`: figures as ratios against a named peer in the same run.

mod cost;
pub mod machine;
mod peers;
pub mod qemu;
pub mod store;

use crate::args::Format;
use crate::output;
use anyhow::Result;
use serde_json::{Value, json};

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
