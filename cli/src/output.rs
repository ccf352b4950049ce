//! Printing: tables for people, one shape of JSON and YAML for programs.

use crate::args::Format;
use crate::exit::{OK, coded};
use anyhow::Result;
use comfy_table::{Table, presets};
use serde_json::Value;
use std::io::Write;

/// A column: its head, its key in the row, and whether only `wide` has it.
pub struct Column(pub &'static str, pub &'static str, pub bool);

/// Prints rows, the first column being the name.
pub fn rows(format: Format, columns: &[Column], rows: &[Value]) -> Result<()> {
    match format {
        Format::Json | Format::Yaml => value(format, &Value::from(rows.to_vec())),
        Format::Name => {
            let key = columns[0].1;
            line(rows.iter().map(|row| cell(&row[key])).collect::<Vec<_>>().join("\n"))
        }
        Format::Table | Format::Wide => {
            let shown: Vec<&Column> = columns.iter().filter(|c| !c.2 || format == Format::Wide).collect();
            let mut table = Table::new();
            table.load_preset(presets::NOTHING);
            table.set_header(shown.iter().map(|c| c.0));
            for row in rows {
                table.add_row(shown.iter().map(|c| cell(&row[c.1])));
            }
            line(table.lines().map(|text| text.trim_end().to_string()).collect::<Vec<_>>().join("\n"))
        }
    }
}

/// Prints one value as JSON or YAML.
pub fn value(format: Format, value: &Value) -> Result<()> {
    match format {
        Format::Yaml => {
            let text = serde_norway::to_string(value)?;
            line(text.trim_end().to_string())
        }
        _ => line(serde_json::to_string_pretty(value)?),
    }
}

/// Prints to standard output. A reader that has gone away is no error.
pub fn line(text: String) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        // Nothing went wrong, and nobody reads on.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Err(coded(OK, "")),
        done => Ok(done?),
    }
}

/// Says something on standard error. That may be a file on a full disk: it is then lost, and what
/// was to be done goes on.
pub fn say(text: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

fn cell(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Number(number) => number.as_u64().map_or_else(|| number.to_string(), grouped),
        Value::Object(map) => {
            let pairs: Vec<String> = map.iter().map(|(k, v)| format!("{k}={}", cell(v))).collect();
            pairs.join(",")
        }
        Value::Array(list) => list.iter().map(cell).collect::<Vec<_>>().join(" "),
        Value::Bool(flag) => flag.to_string(),
    }
}

/// `1234567` as `1,234,567`.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i) % 3 == 0 {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Bytes for people.
pub fn bytes(number: u64) -> String {
    match number {
        0..=9_999 => format!("{number} B"),
        10_000..=9_999_999 => format!("{:.1} KB", number as f64 / 1e3),
        _ => format!("{:.1} MB", number as f64 / 1e6),
    }
}

/// Whether a program reads this, which wants nothing else on standard output.
pub fn is_for_programs(format: Format) -> bool {
    matches!(format, Format::Json | Format::Yaml | Format::Name)
}
