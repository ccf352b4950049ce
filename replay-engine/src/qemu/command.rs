//! The user's QEMU command line: what a recording makes of it, and what it refuses.
//!
//! Only options that are known here are accepted: a replay runs what was recorded on
//! other machines, so nothing unknown may reach them. Files become `{file:N}`, disks
//! `{disk:N}` behind `blkreplay`, network devices get a `filter-replay`.

use super::log::Dialect;
use super::options::{
    DRIVE_LETTERS, FILES, FLAGS, GONE_IN_10, MACHINE_FILES, PLAIN, REFUSED, is_own_firmware, refused_device,
};
use super::recorded::check;
use std::path::PathBuf;

/// Why a command line can't be recorded, and what to use instead.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{what} can't be recorded: {why}")]
pub struct Refused {
    /// The option as given.
    pub what: String,
    /// Why, and what to use.
    pub why: String,
}

pub(super) fn refuse<T>(what: impl Into<String>, why: impl Into<String>) -> Result<T, Refused> {
    Err(Refused { what: what.into(), why: why.into() })
}

/// A disk that the command line names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Its file.
    pub path: PathBuf,
    /// Its format; `None`: as its first bytes say.
    pub format: Option<String>,
}

/// A command line, taken apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// What goes into the manifest.
    pub arguments: Vec<String>,
    /// Files read as they are.
    pub files: Vec<PathBuf>,
    /// Disks.
    pub disks: Vec<Disk>,
    /// `-icount`'s options but for rr.
    pub icount: String,
    /// The machine type as given; empty: QEMU's default.
    pub machine: String,
    /// Guest RAM.
    pub memory_bytes: u64,
    /// What was added or changed, for people.
    pub notes: Vec<String>,
}

/// Which QEMU it is for.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// `x86_64`, `riscv64`, ...
    pub arch: &'a str,
    /// Its log's dialect.
    pub dialect: Dialect,
}

impl Target<'_> {
    fn is_x86(&self) -> bool {
        matches!(self.arch, "x86_64" | "i386")
    }
}

/// What stands for files in a recorded command line.
const MARKS: [&str; 3] = ["{file:", "{disk:", "{scratch}"];

/// `key=value` pairs of an option, commas doubled as QEMU has them.
pub(super) fn pairs(value: &str) -> Vec<(String, String)> {
    let mut parts = vec![String::new()];
    let mut chars = value.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            ',' if chars.peek() == Some(&',') => {
                chars.next();
                parts.last_mut().expect("never empty").push(',');
            }
            ',' => parts.push(String::new()),
            c => parts.last_mut().expect("never empty").push(c),
        }
    }
    parts
        .into_iter()
        .map(|part| match part.split_once('=') {
            Some((key, value)) => (key.to_string(), value.to_string()),
            None => (part, String::new()),
        })
        .collect()
}

fn take(pairs: &mut Vec<(String, String)>, key: &str) -> Option<String> {
    let at = pairs.iter().position(|(found, _)| found == key)?;
    Some(pairs.remove(at).1)
}

fn join(pairs: &[(String, String)]) -> String {
    let one = |(key, value): &(String, String)| {
        let value = value.replace(',', ",,");
        if value.is_empty() && key != "romfile" { key.clone() } else { format!("{key}={value}") }
    };
    pairs.iter().map(one).collect::<Vec<_>>().join(",")
}

/// Takes the user's arguments, without the program, apart.
pub fn plan(arguments: &[String], target: Target) -> Result<Plan, Refused> {
    let mut planner = Planner { target, ..Planner::new(target) };
    let is_marked = |argument: &&String| MARKS.iter().any(|mark| argument.contains(mark));
    if let Some(argument) = arguments.iter().find(is_marked) {
        return refuse(argument, "it contains a mark that heddle uses for files");
    }
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        let Some(name) = argument.strip_prefix("--").or_else(|| argument.strip_prefix('-')) else {
            planner.drive(&format!("file={},if=ide,index=0", argument.replace(',', ",,")))?;
            continue;
        };
        if target.dialect == Dialect::Qemu10
            && let Some((_, instead)) = GONE_IN_10.iter().find(|(gone, _)| *gone == name)
        {
            return refuse(format!("-{name}"), format!("QEMU 10 has it no more; use {instead}"));
        }
        if FLAGS.contains(&name) {
            planner.plan.arguments.push(format!("-{name}"));
            continue;
        }
        if name != "accel"
            && let Some((_, why)) = REFUSED.iter().find(|(refused, _)| *refused == name)
        {
            return refuse(format!("-{name}"), *why);
        }
        let Some(value) = arguments.next() else { return refuse(format!("-{name}"), "its value is missing") };
        planner.option(name, value)?;
    }
    planner.finish()
}

struct Planner<'a> {
    target: Target<'a>,
    plan: Plan,
    serials: u32,
    netdevs: Vec<String>,
    has_net: bool,
    icount: Vec<(String, String)>,
}

impl<'a> Planner<'a> {
    fn new(target: Target<'a>) -> Planner<'a> {
        let plan = Plan { memory_bytes: 128 << 20, ..Plan::default() };
        Planner { target, plan, serials: 0, netdevs: vec![], has_net: false, icount: vec![] }
    }

    fn push(&mut self, name: &str, value: impl Into<String>) {
        self.plan.arguments.push(format!("-{name}"));
        self.plan.arguments.push(value.into());
    }

    fn file(&mut self, path: &str) -> String {
        self.plan.files.push(PathBuf::from(path));
        format!("{{file:{}}}", self.plan.files.len() - 1)
    }

    fn option(&mut self, name: &str, value: &str) -> Result<(), Refused> {
        let shown = || format!("-{name} {value}");
        if FILES.contains(&name) && !is_own_firmware(name, value) {
            let mark = self.file(value);
            self.push(name, mark);
            return Ok(());
        }
        if DRIVE_LETTERS.contains(&name) {
            let index = DRIVE_LETTERS.iter().position(|letter| *letter == name).unwrap_or(0);
            return self.drive(&format!("file={},if=ide,index={index}", value.replace(',', ",,")));
        }
        match name {
            "cpu" if value.starts_with("host") => {
                refuse(shown(), "it differs from host to host; name a model")
            }
            "action" if value.contains("shutdown") => refuse(shown(), "shutdown is handled by the recording"),
            "global" if value.contains('/') => refuse(shown(), "a host path in a property is not stored"),
            "audiodev" if !value.starts_with("none") => {
                refuse(shown(), "only -audiodev none is known to replay")
            }
            _ if PLAIN.contains(&name) || FILES.contains(&name) => {
                self.push(name, value);
                Ok(())
            }
            "M" | "machine" => self.machine(value),
            "accel" if value == "tcg" || value == "tcg,thread=single" => Ok(()),
            "accel" => refuse(shown(), "only tcg with one thread counts instructions"),
            "m" => {
                let Some(bytes) = memory(value) else { return refuse(shown(), "its size is not understood") };
                self.plan.memory_bytes = bytes;
                self.push(name, value);
                Ok(())
            }
            "smp" if pairs(value).iter().all(|(key, value)| is_one(key, value)) => {
                self.push(name, value);
                Ok(())
            }
            "smp" => refuse(shown(), "QEMU records one CPU; use -smp 1"),
            "icount" => self.icount(value),
            "rtc" => self.rtc(value),
            "display" if value == "none" => {
                self.push(name, value);
                Ok(())
            }
            "display" => refuse(shown(), "use -display none, and the serial console"),
            "serial" => self.serial(value),
            "parallel" | "monitor" if ["none", "null"].contains(&value) => {
                self.push(name, value);
                Ok(())
            }
            "parallel" | "monitor" => refuse(shown(), "only none and null are recorded"),
            "chardev" if value.starts_with("null") => {
                self.push(name, value);
                Ok(())
            }
            "chardev" => refuse(shown(), "QEMU records the character devices of -serial alone; use -serial"),
            "drive" => self.drive(value),
            "cdrom" => self.drive(&format!("file={},if=ide,index=2,media=cdrom", value.replace(',', ",,"))),
            "device" => self.device(value),
            "netdev" => self.netdev(value),
            "nic" | "net" => self.nic(name, value),
            "object" => match value.split(',').next() {
                Some("rng-builtin" | "memory-backend-ram") => {
                    self.push(name, value);
                    Ok(())
                }
                Some("rng-random" | "rng-egd") => refuse(shown(), "the host's entropy; use rng-builtin"),
                _ => refuse(shown(), "only rng-builtin and memory-backend-ram are known to replay"),
            },
            "fw_cfg" => {
                let mut given = pairs(value);
                if let Some(path) = take(&mut given, "file") {
                    let mark = self.file(&path);
                    given.push(("file".into(), mark));
                }
                self.push(name, join(&given));
                Ok(())
            }
            _ => refuse(shown(), "heddle does not know this option, so it can't say whether it replays"),
        }
    }

    fn machine(&mut self, value: &str) -> Result<(), Refused> {
        let mut given = pairs(value);
        for (key, value) in &given {
            if key == "accel" && value != "tcg" {
                return refuse(format!("-machine accel={value}"), "only tcg counts instructions");
            }
        }
        take(&mut given, "accel");
        let named = take(&mut given, "type");
        let first = given.first().filter(|(_, value)| value.is_empty()).map(|(key, _)| key.clone());
        if let Some(name) = named.clone().or(first) {
            self.plan.machine = name;
        }
        if let Some((key, _)) = given.iter().find(|(key, _)| MACHINE_FILES.contains(&key.as_str())) {
            return refuse(format!("-machine {key}="), "give the file as an option of its own");
        }
        if let Some(named) = named {
            given.insert(0, (named, String::new()));
        }
        if !given.is_empty() {
            self.push("machine", join(&given));
        }
        Ok(())
    }

    fn icount(&mut self, value: &str) -> Result<(), Refused> {
        let mut given = pairs(value);
        if let Some((first, _)) = given.first().filter(|(_, value)| value.is_empty()).cloned() {
            given[0] = ("shift".into(), first);
        }
        for (key, value) in &given {
            match (key.as_str(), value.as_str()) {
                ("shift", value)
                    if value == "auto" || value.parse::<u32>().is_ok_and(|shift| shift <= 10) => {}
                ("sleep", "on") | ("align", "off") => {}
                ("sleep", _) => {
                    return refuse("-icount sleep=off", "disks, input and network never complete with it");
                }
                _ => {
                    return refuse(
                        format!("-icount {key}={value}"),
                        "only shift, sleep=on and align=off are",
                    );
                }
            }
        }
        self.icount = given;
        Ok(())
    }

    fn rtc(&mut self, value: &str) -> Result<(), Refused> {
        let given = pairs(value);
        let of = |key: &str| given.iter().find(|(found, _)| found == key).map(|(_, value)| value.as_str());
        let (base, is_vm) = (of("base"), of("clock") == Some("vm"));
        if base == Some("localtime") {
            return refuse(format!("-rtc {value}"), "it differs from host to host; use base=utc or a date");
        }
        let is_date = base.is_some_and(|base| base != "utc");
        if self.target.dialect == Dialect::Qemu10 && is_date != is_vm {
            return refuse(format!("-rtc {value}"), "QEMU 10 replays a date only together with clock=vm");
        }
        self.push("rtc", value);
        Ok(())
    }

    fn serial(&mut self, value: &str) -> Result<(), Refused> {
        let serial = self.serials;
        self.serials += 1;
        match value {
            "none" | "null" | "stdio" | "vc" => self.push("serial", value),
            "mon:stdio" => {
                self.push("serial", "stdio");
                let why = "-serial stdio, not mon:stdio: QEMU does not record what is typed at both";
                self.plan.notes.push(why.into());
            }
            _ if value.starts_with("file:") => {
                self.push("serial", format!("file:{{scratch}}/serial{serial}"))
            }
            _ => return refuse(format!("-serial {value}"), "use stdio, file:, null or none"),
        }
        Ok(())
    }

    fn drive(&mut self, value: &str) -> Result<(), Refused> {
        let mut given = pairs(value);
        let what = || format!("-drive {value}");
        let Some(path) = take(&mut given, "file") else {
            return refuse(what(), "it names no file");
        };
        let interface = take(&mut given, "if").unwrap_or_else(|| "ide".into());
        let format = take(&mut given, "format");
        let is_read_only = given.iter().any(|(key, value)| {
            ["readonly", "read-only"].contains(&key.as_str()) && ["", "on"].contains(&value.as_str())
        });
        if interface == "pflash" {
            if !is_read_only {
                return refuse(what(), "writes to flash are not recorded; use readonly=on, or -bios");
            }
            let mark = self.file(&path);
            let unit = take(&mut given, "unit").map_or(String::new(), |unit| format!(",unit={unit}"));
            if format.is_some_and(|format| format != "raw") {
                return refuse(what(), "flash is read as raw");
            }
            self.push("drive", format!("file={mark},if=pflash,format=raw,readonly=on{unit}"));
            return Ok(());
        }
        let is_cdrom = take(&mut given, "media").as_deref() == Some("cdrom");
        let (bus, unit) = (take(&mut given, "bus"), take(&mut given, "unit"));
        let index: Option<u32> = take(&mut given, "index").and_then(|index| index.parse().ok());
        let id = take(&mut given, "id");
        let serial = take(&mut given, "serial");
        for key in [
            "cache",
            "aio",
            "discard",
            "detect-zeroes",
            "werror",
            "rerror",
            "snapshot",
            "readonly",
            "read-only",
        ] {
            take(&mut given, key);
        }
        if let Some((key, _)) = given.first() {
            return refuse(what(), format!("heddle does not know {key} of a drive"));
        }
        let number = self.plan.disks.len();
        let id = id.unwrap_or_else(|| format!("heddle-disk{number}"));
        if id.contains(',') {
            return refuse(what(), "its id has a comma");
        }
        self.plan.disks.push(Disk { path: PathBuf::from(path), format });
        self.push("drive", format!("file={{disk:{number}}},if=none,format=qcow2,cache=unsafe,id={id}-image"));
        self.push("drive", format!("driver=blkreplay,if=none,image={id}-image,id={id}"));
        let serial = serial.map_or(String::new(), |serial| format!(",serial={}", serial.replace(',', ",,")));
        match interface.as_str() {
            "none" => {}
            "virtio" => self.push("device", format!("virtio-blk-pci,drive={id}{serial}")),
            "ide" => {
                let device = if is_cdrom { "ide-cd" } else { "ide-hd" };
                // An index counts two units to a bus.
                let bus = bus.or_else(|| index.map(|index| format!("ide.{}", index / 2)));
                let unit = unit.or_else(|| index.map(|index| (index % 2).to_string()));
                let place: String = [("bus", bus), ("unit", unit)]
                    .into_iter()
                    .filter_map(|(key, value)| Some(format!(",{key}={}", value?)))
                    .collect();
                self.push("device", format!("{device},drive={id}{place}{serial}"));
            }
            other => {
                return refuse(what(), format!("if={other} is not known to replay; use if=virtio or if=ide"));
            }
        }
        Ok(())
    }

    fn device(&mut self, value: &str) -> Result<(), Refused> {
        if value.starts_with('{') {
            return refuse(format!("-device {value}"), "give it as NAME,key=value");
        }
        let mut given = pairs(value);
        if let Some(driver) = take(&mut given, "driver") {
            given.insert(0, (driver, String::new()));
        }
        let name = given.first().map(|(name, _)| name.clone()).unwrap_or_default();
        if let Some(why) = refused_device(&name) {
            return refuse(format!("-device {name}"), why);
        }
        for key in ["file", "romfile"] {
            match take(&mut given, key) {
                // An empty one means none, and is not the same as none given.
                Some(path) if path.is_empty() => given.push((key.into(), path)),
                Some(path) => {
                    let mark = self.file(&path);
                    given.push((key.into(), mark));
                }
                None => {}
            }
        }
        if let Some((key, _)) = given.iter().find(|(_, value)| value.starts_with('/')) {
            return refuse(format!("-device {value}"), format!("the host path in {key} is not stored"));
        }
        let is_virtio_net = name.starts_with("virtio-net");
        let has_tx = given.iter().any(|(key, _)| key == "tx");
        if is_virtio_net && self.target.dialect == Dialect::Qemu7 && !has_tx {
            given.push(("tx".into(), "timer".into()));
            self.plan.notes.push("virtio-net gets tx=timer: with tx=bh QEMU 7's replay hangs".into());
        }
        self.has_net |= given.iter().any(|(key, _)| key == "netdev");
        self.push("device", join(&given));
        Ok(())
    }

    fn netdev(&mut self, value: &str) -> Result<(), Refused> {
        let given = pairs(value);
        let kind = given.first().map(|(kind, _)| kind.as_str()).unwrap_or_default();
        let id = given.iter().find(|(key, _)| key == "id").map(|(_, id)| id.clone());
        let Some(id) = id else { return refuse(format!("-netdev {value}"), "it has no id") };
        if kind != "user" {
            return refuse(format!("-netdev {value}"), "only user networking can be replayed elsewhere");
        }
        let reaching = ["hostfwd", "guestfwd", "smb", "tftp", "bootfile"];
        if let Some((key, _)) = given.iter().find(|(key, _)| reaching.contains(&key.as_str())) {
            return refuse(format!("-netdev {key}="), "a replay elsewhere must not reach out of the guest");
        }
        if id.contains(',') {
            return refuse(format!("-netdev {value}"), "its id has a comma");
        }
        self.has_net = true;
        self.push("netdev", value);
        self.push("object", format!("filter-replay,id={id}-replay,netdev={id}"));
        self.netdevs.push(id);
        Ok(())
    }

    fn nic(&mut self, name: &str, value: &str) -> Result<(), Refused> {
        let mut given = pairs(value);
        let kind = given.first().map(|(kind, _)| kind.clone()).unwrap_or_default();
        match (name, kind.as_str()) {
            (_, "none") => {
                self.has_net = true;
                self.push("nic", "none");
                Ok(())
            }
            ("nic", "user") => {
                let model = take(&mut given, "model").unwrap_or_else(|| self.default_nic().to_string());
                let mac = take(&mut given, "mac").map_or(String::new(), |mac| format!(",mac={mac}"));
                let id = format!("heddle-net{}", self.netdevs.len());
                given.push(("id".into(), id.clone()));
                self.netdev(&join(&given))?;
                let model = if model == "virtio" { "virtio-net-pci".into() } else { model };
                self.device(&format!("{model},netdev={id}{mac}"))
            }
            _ => refuse(
                format!("-{name} {value}"),
                "use -netdev user,id=ID with -device, -nic user, or -nic none",
            ),
        }
    }

    fn default_nic(&self) -> &'static str {
        match (self.target.is_x86(), self.plan.machine.contains("q35")) {
            (true, true) => "e1000e",
            (true, false) => "e1000",
            _ => "virtio-net-pci",
        }
    }

    /// The PCs have one; a microvm has not, and not the option either.
    fn has_hpet(&self) -> bool {
        let machine = self.plan.machine.as_str();
        machine.is_empty() || machine.starts_with("pc") || machine.contains("q35")
    }

    fn finish(mut self) -> Result<Plan, Refused> {
        if self.target.is_x86() {
            self.push("global", "apic-common.vapic=off");
            self.plan.notes.push("vapic=off: with it, QEMU's replay from a snapshot can deadlock".into());
            let machine = self.plan.arguments.iter().position(|a| a == "-machine");
            if self.target.dialect == Dialect::Qemu10 && self.has_hpet() {
                match machine {
                    Some(at) if !self.plan.arguments[at + 1].contains("hpet=") => {
                        self.plan.arguments[at + 1].push_str(",hpet=off");
                    }
                    Some(_) => {}
                    None => self.push("machine", "hpet=off"),
                }
                self.plan.notes.push("hpet=off: QEMU 10's snapshots with a used HPET don't replay".into());
            }
        }
        let has_defaults = !self.plan.arguments.iter().any(|argument| argument == "-nodefaults");
        if !self.has_net && has_defaults {
            if self.target.is_x86() {
                self.nic("nic", "user")?;
                self.plan.notes.push("the default network card is behind a filter-replay".into());
            } else {
                self.push("nic", "none");
            }
        }
        if !self.icount.iter().any(|(key, _)| key == "shift") {
            self.icount.insert(0, ("shift".into(), "auto".into()));
        }
        if !self.icount.iter().any(|(key, _)| key == "sleep") {
            self.icount.push(("sleep".into(), "on".into()));
        }
        self.plan.icount = join(&self.icount);
        // What a node would refuse is refused here, before anything is stored.
        check(&self.plan.arguments)?;
        Ok(self.plan)
    }
}

fn is_one(key: &str, value: &str) -> bool {
    match (key, value) {
        (count, "") => count == "1",
        ("cpus" | "maxcpus" | "cores" | "threads" | "sockets", count) => count == "1",
        _ => false,
    }
}

/// QEMU's sizes: MiB without a suffix.
fn memory(value: &str) -> Option<u64> {
    let given = pairs(value);
    let size = given
        .iter()
        .find_map(|(key, value)| match (key.as_str(), value.as_str()) {
            ("size", size) => Some(size),
            (size, "") => Some(size),
            _ => None,
        })?
        .trim();
    let (digits, shift) = match size.chars().last()? {
        'k' | 'K' => (&size[..size.len() - 1], 10),
        'm' | 'M' => (&size[..size.len() - 1], 20),
        'g' | 'G' => (&size[..size.len() - 1], 30),
        _ => (size, 20),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
#[path = "command/tests.rs"]
mod tests;
