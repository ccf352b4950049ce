//! `heddle doctor`: what the QEMU builds of this machine can do.

use crate::args::{Doctor, Format};
use crate::exit::{INCOMPATIBLE, NOTHING, OK, coded};
use crate::output;
use crate::serve::offered;
use anyhow::Result;
use heddle_node::qemu::doctor::{examine, remember};
use serde_json::{Value, json};

/// Tests every build; exit 6 if one fails at something.
pub async fn run(command: Doctor, format: Format) -> Result<u8> {
    let builds = offered(&command.qemu).await;
    if builds.is_empty() {
        return Err(coded(NOTHING, "no QEMU was found; on Debian: apt install qemu-system"));
    }
    let mut rows: Vec<Value> = vec![];
    let mut is_good = true;
    for build in builds {
        let of = build.clone();
        let checks = tokio::task::spawn_blocking(move || examine(&of)).await?;
        remember(&build.name, &checks)?;
        if format == Format::Table || format == Format::Wide {
            output::line(format!("{}  {}", build.name, build.binary.display()))?;
        }
        for check in checks {
            let (state, text) = match &check.result {
                Ok(time) => ("ok", format!("{:.2} s", time.as_secs_f64())),
                Err(why) => ("off", why.clone()),
            };
            is_good &= state == "ok";
            if format == Format::Table || format == Format::Wide {
                output::line(format!("  {:<9} {state:<4} {text}", check.name))?;
            }
            rows.push(json!({ "build": build.name, "check": check.name, "state": state, "text": text }));
        }
    }
    if output::is_for_programs(format) {
        output::value(if format == Format::Yaml { format } else { Format::Json }, &json!(rows))?;
    }
    Ok(if is_good { OK } else { INCOMPATIBLE })
}
