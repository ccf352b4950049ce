//! The manifest: all that a replay needs to know beside the log.

use crate::{Hash, QemuSpec, RecordingId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Largest encoded manifest.
pub const MANIFEST_BYTES_MAX: usize = 64 << 10;
/// The manifest's version. 3 added [`MachineSpec::devices`], 4 [`MachineSpec::harts`], 5
/// [`MachineSpec::dtb`] and 6 [`MachineSpec::seed`], which a build that reads only older ones
/// would pass over in silence; a newer one is refused by its number.
pub const MANIFEST_VERSION: u32 = 6;
/// The oldest version that is still read: its machines have one hart, disks alone, and their own
/// device tree without a seed.
pub const MANIFEST_VERSION_OLDEST: u32 = 2;

/// What was recorded, on what, and how.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`MANIFEST_VERSION`] where it was written.
    pub version: u32,
    /// The recording's id.
    pub id: RecordingId,
    /// The user's name for it.
    pub name: String,
    /// The user's labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// When it began, milliseconds since 1970.
    pub created_unix_ms: u64,
    /// The emulator build that recorded it; a plain replay runs only there.
    pub build: String,
    /// What ran.
    pub emulator: EmulatorSpec,
}

/// The emulator and the machine it ran.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EmulatorSpec {
    /// The built-in machine.
    Builtin {
        /// The machine.
        machine: Box<MachineSpec>,
        /// Where checks, digests and snapshots stand.
        positions: Positions,
    },
    /// A QEMU of the user's.
    Qemu(QemuSpec),
}

/// The built-in machine as configured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineSpec {
    /// Harts, which take turns on one thread.
    #[serde(default = "one_hart")]
    pub harts: u32,
    /// Guest RAM.
    pub memory_bytes: u64,
    /// Nanoseconds an instruction, as a power of two.
    pub shift: u32,
    /// Whether idle time passes in real time (`on`) or is jumped over (`off`).
    pub sleep: Sleep,
    /// Firmware, entered first.
    pub bios: Option<Image>,
    /// Kernel, or an ELF to run bare.
    pub kernel: Option<Image>,
    /// Initial RAM disk.
    pub initrd: Option<Image>,
    /// Device tree, if not the machine's own.
    #[serde(default)]
    pub dtb: Option<Image>,
    /// What the `rng-seed` of the machine's own device tree is made from; without it there is none.
    #[serde(default)]
    pub seed: Option<u64>,
    /// Kernel command line.
    #[serde(default)]
    pub append: String,
    /// Disks, in the order of their virtio slots, which they take from the first up.
    #[serde(default)]
    pub drives: Vec<Image>,
    /// Other virtio devices, each at most once; they take the slots from the last down.
    #[serde(default)]
    pub devices: Vec<Device>,
}

/// A virtio device that has no image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// A network card.
    Net,
    /// A source of entropy.
    Rng,
    /// A console beside the UART.
    Console,
}

/// Most harts, as on QEMU's `virt`.
pub const HARTS_MAX: u32 = 8;

/// What a machine has of whom it is not said.
fn one_hart() -> u32 {
    1
}

/// Slots for disks and devices together.
pub const VIRTIO_SLOTS: usize = 8;

/// What the virtual clock does while every vCPU is idle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sleep {
    /// It follows real time.
    On,
    /// It jumps to the next deadline, but never past an outstanding completion.
    Off,
}

/// A file, by content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// BLAKE3 of the whole.
    pub hash: Hash,
    /// Its length.
    pub bytes: u64,
    /// The block that lists its blocks.
    pub index: Hash,
    /// The name the user gave, for people only.
    pub name: String,
}

/// Fixed positions, in instructions. Any two runs can be compared there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Positions {
    /// A check every so many instructions.
    pub check_every: u64,
    /// A state and history digest every so many; a multiple of `check_every`.
    pub digest_every: u64,
    /// A snapshot every so many, zero for none; a multiple of `digest_every`.
    pub snapshot_every: u64,
    /// Further digests and snapshots, ascending.
    #[serde(default)]
    pub snapshots_at: Vec<u64>,
}

impl Positions {
    /// The first position after `icount`.
    pub fn next_after(&self, icount: u64) -> u64 {
        let fixed = (icount / self.check_every + 1).saturating_mul(self.check_every);
        let extra = self.snapshots_at.iter().copied().find(|at| *at > icount);
        extra.map_or(fixed, |at| at.min(fixed))
    }

    /// Whether a digest stands at `icount`.
    pub fn is_digest(&self, icount: u64) -> bool {
        icount % self.digest_every == 0 || self.snapshots_at.binary_search(&icount).is_ok()
    }

    /// Whether a snapshot stands at `icount`.
    pub fn is_snapshot(&self, icount: u64) -> bool {
        (self.snapshot_every != 0 && icount % self.snapshot_every == 0)
            || self.snapshots_at.binary_search(&icount).is_ok()
    }
}

/// Why bytes are not a manifest.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Not JSON of the right shape.
    #[error("manifest does not parse: {0}")]
    Json(#[from] serde_json::Error),
    /// A version this build does not read.
    #[error("manifest has version {0}; this build reads {MANIFEST_VERSION_OLDEST} to {MANIFEST_VERSION}")]
    Version(u32),
    /// A value out of its bounds.
    #[error("manifest's {what} is {value}: {rule}")]
    Bound {
        /// The field.
        what: &'static str,
        /// Its value.
        value: u64,
        /// What it must be.
        rule: &'static str,
    },
}

impl Manifest {
    /// The built-in machine and its positions, if that is what ran.
    pub fn builtin(&self) -> Option<(&MachineSpec, &Positions)> {
        match &self.emulator {
            EmulatorSpec::Builtin { machine, positions } => Some((machine, positions)),
            EmulatorSpec::Qemu(_) => None,
        }
    }

    /// The QEMU recording, if that is what ran.
    pub fn qemu(&self) -> Option<&QemuSpec> {
        match &self.emulator {
            EmulatorSpec::Builtin { .. } => None,
            EmulatorSpec::Qemu(spec) => Some(spec),
        }
    }

    /// JSON bytes.
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a manifest has string keys only")
    }

    /// Reads and checks a manifest.
    pub fn decode(bytes: &[u8]) -> Result<Manifest, ManifestError> {
        #[derive(Deserialize)]
        struct Probe {
            version: u32,
        }
        let Probe { version } = serde_json::from_slice(bytes)?;
        if !(MANIFEST_VERSION_OLDEST..=MANIFEST_VERSION).contains(&version) {
            return Err(ManifestError::Version(version));
        }
        let manifest: Manifest = serde_json::from_slice(bytes)?;
        manifest.check()?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), ManifestError> {
        let (m, p) = match &self.emulator {
            EmulatorSpec::Builtin { machine, positions } => (machine, positions),
            EmulatorSpec::Qemu(spec) => {
                let count = spec.arguments.len() as u64;
                bound(count <= 1024, "arguments", count, "at most 1024")?;
                for disk in &spec.disks {
                    bound(disk.guest_bytes <= 64 << 40, "guest_bytes", disk.guest_bytes, "at most 64 TiB")?;
                }
                let memory = spec.memory_bytes;
                bound(memory <= 64 << 30, "memory_bytes", memory, "at most 64 GiB")?;
                let count = (spec.files.len() + spec.disks.len()) as u64;
                return bound(count <= 64, "files and disks", count, "at most 64");
            }
        };
        m.check()?;
        bound(p.check_every >= 1000, "check_every", p.check_every, "at least 1000")?;
        let nested = p.digest_every != 0 && p.digest_every % p.check_every == 0;
        bound(nested, "digest_every", p.digest_every, "a multiple of check_every")?;
        let nested = p.snapshot_every % p.digest_every == 0;
        bound(nested, "snapshot_every", p.snapshot_every, "a multiple of digest_every, or 0")?;
        let sorted = p.snapshots_at.is_sorted();
        bound(sorted, "snapshots_at", p.snapshots_at.len() as u64, "ascending")
    }
}

impl MachineSpec {
    /// Whether there can be such a machine.
    pub fn check(&self) -> Result<(), ManifestError> {
        let m = self;
        let harts = u64::from(m.harts);
        bound((1..=HARTS_MAX).contains(&m.harts), "harts", harts, "from 1 to 8")?;
        let memory = m.memory_bytes;
        let whole = memory % (1 << 21) == 0 && (1 << 21..=4 << 30).contains(&memory);
        bound(whole, "memory_bytes", memory, "a multiple of 2 MiB, from 2 MiB to 4 GiB")?;
        bound(m.shift <= 10, "shift", u64::from(m.shift), "at most 10")?;
        let used = m.drives.len() + m.devices.len();
        bound(used <= VIRTIO_SLOTS, "drives and devices", used as u64, "at most 8 together")?;
        let is_twice = (1..m.devices.len()).any(|i| m.devices[..i].contains(&m.devices[i]));
        bound(!is_twice, "devices", m.devices.len() as u64, "each at most once")?;
        // A tree that is given is taken as it is: the seed would be nowhere.
        let is_nowhere = m.seed.is_some() && m.dtb.is_some();
        bound(!is_nowhere, "seed", m.seed.unwrap_or(0), "none where a device tree is given")
    }
}

fn bound(ok: bool, what: &'static str, value: u64, rule: &'static str) -> Result<(), ManifestError> {
    if ok { Ok(()) } else { Err(ManifestError::Bound { what, value, rule }) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// As a build of version 2 wrote it.
    const OLDER: &str = r#"{"version":2,"id":"07070707070707070707070707070707","name":"older","labels":{},
        "created_unix_ms":1,"build":"builtin-0.1.0","emulator":{"builtin":{"machine":{"memory_bytes":16777216,
        "shift":3,"sleep":"on","bios":null,"kernel":null,"initrd":null,"append":"","drives":[]},
        "positions":{"check_every":1000000,"digest_every":10000000,"snapshot_every":0,"snapshots_at":[]}}}}"#;

    fn empty(name: &str) -> Image {
        Image { hash: Hash::ZERO, bytes: 0, index: Hash::ZERO, name: name.into() }
    }

    fn with_devices(devices: &[Device], drives: usize) -> Result<Manifest, ManifestError> {
        let mut manifest = Manifest::decode(OLDER.as_bytes()).unwrap();
        manifest.version = MANIFEST_VERSION;
        if let EmulatorSpec::Builtin { machine, .. } = &mut manifest.emulator {
            machine.devices = devices.to_vec();
            machine.drives = vec![empty("disk"); drives];
        }
        Manifest::decode(&manifest.encode())
    }

    #[test]
    fn an_older_manifest_has_one_hart_and_no_devices_and_others_are_refused_by_number() {
        let older = Manifest::decode(OLDER.as_bytes()).unwrap();
        assert_eq!(older.version, 2);
        assert!(older.builtin().unwrap().0.devices.is_empty());
        let old = OLDER.replacen("2", "3", 1).replace("\"drives\":[]", "\"drives\":[],\"devices\":[\"rng\"]");
        let old = Manifest::decode(old.as_bytes()).unwrap();
        assert_eq!((old.version, &old.builtin().unwrap().0.devices[..]), (3, &[Device::Rng][..]));
        for manifest in [older, old] {
            let (machine, _) = manifest.builtin().unwrap();
            assert_eq!((machine.harts, &machine.dtb, machine.seed), (1, &None, None));
        }
        for version in [1, MANIFEST_VERSION + 1] {
            let other = OLDER.replacen("2", &version.to_string(), 1);
            let error = Manifest::decode(other.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(&format!("version {version}; this build reads 2 to 6")), "{error}");
        }
    }

    #[test]
    fn harts_are_as_many_as_there_can_be() {
        let with = |harts: u32| {
            let mut manifest = Manifest::decode(OLDER.as_bytes()).unwrap();
            manifest.version = MANIFEST_VERSION;
            if let EmulatorSpec::Builtin { machine, .. } = &mut manifest.emulator {
                machine.harts = harts;
            }
            Manifest::decode(&manifest.encode()).map(|manifest| manifest.builtin().unwrap().0.harts)
        };
        assert_eq!([1, 2, 8].map(|harts| with(harts).unwrap()), [1, 2, 8]);
        for harts in [0, 9, u32::MAX] {
            let error = with(harts).unwrap_err().to_string();
            assert_eq!(error, format!("manifest's harts is {harts}: from 1 to 8"));
        }
    }

    #[test]
    fn a_manifest_of_version_5_has_a_device_tree_and_no_seed() {
        let dtb = serde_json::to_string(&empty("dtb")).unwrap();
        let old = OLDER.replacen("2", "5", 1).replace("\"append\"", &format!("\"dtb\":{dtb},\"append\""));
        let old = Manifest::decode(old.as_bytes()).unwrap();
        let (machine, _) = old.builtin().unwrap();
        assert_eq!((old.version, &machine.dtb, machine.seed), (5, &Some(empty("dtb")), None));
    }

    #[test]
    fn a_seed_is_for_the_machines_own_device_tree() {
        let with = |seed: u64, dtb: Option<Image>| {
            let mut manifest = Manifest::decode(OLDER.as_bytes()).unwrap();
            manifest.version = MANIFEST_VERSION;
            if let EmulatorSpec::Builtin { machine, .. } = &mut manifest.emulator {
                machine.seed = Some(seed);
                machine.dtb = dtb;
            }
            Manifest::decode(&manifest.encode()).map(|manifest| manifest.builtin().unwrap().0.seed)
        };
        for seed in [0, 7, u64::MAX] {
            assert_eq!(with(seed, None).unwrap(), Some(seed));
        }
        let error = with(7, Some(empty("dtb"))).unwrap_err().to_string();
        assert_eq!(error, "manifest's seed is 7: none where a device tree is given");
    }

    #[test]
    fn devices_are_each_there_once_and_have_slots() {
        use Device::{Console, Net, Rng};
        let manifest = with_devices(&[Net, Rng, Console], 5).unwrap();
        assert_eq!(manifest.builtin().unwrap().0.devices, [Net, Rng, Console]);
        assert!(with_devices(&[Net, Rng, Console], 6).is_err());
        assert!(with_devices(&[Rng, Net, Rng], 0).is_err());
    }
}
