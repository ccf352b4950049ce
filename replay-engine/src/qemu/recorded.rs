//! A recorded command line: filled in for a run, and held to the rules it was made by.

use super::command::{Refused, pairs, refuse};
use super::options::{FILES, FLAGS, MACHINE_FILES, PLAIN, is_own_firmware, refused_device};
use heddle_proto::QemuSpec;
use std::path::PathBuf;

/// The command line of a run, from a manifest: files and disks by their paths there.
/// Fails for a mark that names nothing: a manifest is input like any other.
pub fn arguments(
    spec: &QemuSpec,
    files: &[PathBuf],
    disks: &[PathBuf],
    scratch: &std::path::Path,
) -> Result<Vec<String>, Refused> {
    spec.arguments.iter().map(|argument| fill(argument, files, disks, scratch)).collect()
}

fn fill(
    argument: &str,
    files: &[PathBuf],
    disks: &[PathBuf],
    scratch: &std::path::Path,
) -> Result<String, Refused> {
    let mut out = argument.replace("{scratch}", &scratch.display().to_string());
    for (mark, paths) in [("{file:", files), ("{disk:", disks)] {
        while let Some(at) = out.find(mark) {
            let end = out[at..].find('}').map(|len| at + len);
            let path = end.and_then(|end| {
                let number: usize = out[at + mark.len()..end].parse().ok()?;
                paths.get(number)
            });
            let (Some(end), Some(path)) = (end, path) else {
                return refuse(argument, "it names a file that the recording does not have");
            };
            out.replace_range(at..=end, &path.display().to_string());
        }
    }
    Ok(out)
}

/// Drives are written with these keys alone.
const DRIVE_KEYS: [&str; 10] =
    ["cache", "file", "if", "format", "id", "driver", "image", "readonly", "read-only", "unit"];
/// Keys by which a device or a backend reaches out to the host.
const REACHING_KEYS: [&str; 12] = [
    "path",
    "fd",
    "script",
    "downscript",
    "smb",
    "tftp",
    "hostfwd",
    "guestfwd",
    "chardev",
    "mem-path",
    "filename",
    "bootfile",
];

/// Whether every option of a recorded command line is one that
/// [`plan`](super::command::plan) can have written: what reaches a node over the wire is
/// held to the same rules as what a user types.
pub fn check(written: &[String]) -> Result<(), Refused> {
    let mut arguments = written.iter();
    while let Some(argument) = arguments.next() {
        let Some(name) = argument.strip_prefix('-') else { return refuse(argument, "it is no option") };
        if FLAGS.contains(&name) {
            continue;
        }
        let Some(value) = arguments.next() else { return refuse(argument, "its value is missing") };
        if name != "append" && !is_allowed(name, value) {
            return refuse(format!("{argument} {value}"), "it is none that a recording can have");
        }
    }
    Ok(())
}

/// Whether `-icount`'s options are such as [`plan`](super::command::plan) writes.
pub fn check_icount(icount: &str) -> Result<(), Refused> {
    let is_known = |key: &str, value: &str| match key {
        "shift" => value == "auto" || value.parse::<u32>().is_ok_and(|shift| shift <= 10),
        "sleep" => value == "on",
        "align" => value == "off",
        _ => false,
    };
    match pairs(icount).iter().find(|(key, value)| !is_known(key, value)) {
        None => Ok(()),
        Some((key, value)) => refuse(format!("-icount {key}={value}"), "no recording can have it"),
    }
}

fn is_allowed(name: &str, value: &str) -> bool {
    if FILES.contains(&name) {
        return is_own_firmware(name, value) || is_mark(value, "{file:");
    }
    let given = pairs(value);
    let kind = given.first().map_or("", |(key, _)| key.as_str());
    let reaches = given.iter().any(|(key, value)| {
        let is_file = ["file", "romfile"].contains(&key.as_str())
            && !(value.is_empty() || is_mark(value, "{file:") || is_mark(value, "{disk:"));
        is_file || REACHING_KEYS.contains(&key.as_str()) || key.starts_with('/') || value.starts_with('/')
    });
    let is_elsewhere = value.contains("{scratch}") && name != "serial";
    if value.starts_with('{') || reaches || is_elsewhere {
        return false;
    }
    match name {
        "monitor" | "parallel" => ["none", "null"].contains(&value),
        "serial" => {
            let own = value.strip_prefix("file:{scratch}/serial");
            ["none", "null", "stdio", "vc"].contains(&value)
                || own.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
        }
        "display" | "nic" => value == "none",
        "chardev" => kind == "null",
        "audiodev" => kind == "none",
        "netdev" => kind == "user",
        "object" => ["rng-builtin", "memory-backend-ram", "filter-replay"].contains(&kind),
        "drive" => {
            let is_flash = given.iter().any(|(key, value)| key == "if" && value == "pflash");
            let is_raw = given.iter().any(|(key, value)| key == "format" && value == "raw");
            let is_known = given.iter().all(|(key, _)| DRIVE_KEYS.contains(&key.as_str()));
            let driver = given.iter().find(|(key, _)| key == "driver").map(|(_, driver)| driver.as_str());
            is_known && (!is_flash || is_raw) && driver.is_none_or(|driver| driver == "blkreplay")
        }
        "device" => refused_device(kind).is_none() && kind != "driver",
        "machine" => !given.iter().any(|(key, _)| MACHINE_FILES.contains(&key.as_str())),
        "smp" | "m" | "rtc" | "fw_cfg" => true,
        _ => PLAIN.contains(&name),
    }
}

/// Whether a value is one mark and nothing else.
fn is_mark(value: &str, mark: &str) -> bool {
    let number = value.strip_prefix(mark).and_then(|rest| rest.strip_suffix('}'));
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}
