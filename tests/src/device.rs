//! A disk that a test may fill up, cut off and copy: an ext4 in a file, mounted over a
//! loop device. Takes root.

use crate::{leave_out, run};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Whether tests may mount. `HEDDLE_NO_MOUNT` leaves out those that must, and that is said.
pub fn may_mount() -> bool {
    let may = std::env::var_os("HEDDLE_NO_MOUNT").is_none();
    if !may {
        leave_out("HEDDLE_NO_MOUNT is set");
    }
    may
}

/// A mounted device. It is unmounted and gone when dropped, also by a panic: declare it
/// before what runs on it.
pub struct Device {
    image: PathBuf,
    path: PathBuf,
}

impl Device {
    /// An empty one of so many bytes, mounted at `name` in `dir`.
    pub fn new(dir: &Path, name: &str, bytes: u64) -> Device {
        let image = dir.join(format!("{name}.img"));
        File::create(&image).unwrap().set_len(bytes).unwrap();
        let mut command = Command::new("mkfs.ext4");
        // Few inodes, and nothing kept for root.
        command.args(["-q", "-F", "-T", "largefile", "-m", "0"]);
        // The kernel has nothing to finish later, beneath a copy.
        command.args(["-E", "lazy_itable_init=0,lazy_journal_init=0"]);
        run(command.arg(&image), b"").expect(0);
        Device::mount(image, &dir.join(name))
    }

    fn mount(image: PathBuf, path: &Path) -> Device {
        std::fs::create_dir_all(path).unwrap();
        let mut command = Command::new("mount");
        command.args(["-t", "ext4", "-o", "loop,noatime"]).arg(&image).arg(path);
        let said = run(&mut command, b"");
        assert!(
            said.code == 0,
            "can't mount {}: {}\nThis test needs root and loop devices; HEDDLE_NO_MOUNT=1 leaves it out.",
            image.display(),
            said.err.trim()
        );
        Device { image, path: path.canonicalize().unwrap() }
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Another device, with what has reached this one. What only the kernel's memory has is
    /// lost, as in a power cut. Who writes has been stopped before.
    pub fn copy(&self, dir: &Path, name: &str) -> Device {
        let image = dir.join(format!("{name}.img"));
        let limit = Instant::now() + Duration::from_secs(30);
        loop {
            let before = self.writes();
            if before.in_flight == 0 {
                let mut command = Command::new("cp");
                run(command.arg("--sparse=always").arg(&self.image).arg(&image), b"").expect(0);
                // With the kernel still writing it would be a copy of no one moment.
                if self.writes() == before {
                    return Device::mount(image, &dir.join(name));
                }
            }
            assert!(Instant::now() < limit, "{} never comes to rest", self.image.display());
            sleep(Duration::from_millis(2));
        }
    }

    /// Takes so many bytes away from others.
    pub fn fill(&self, bytes: u64) {
        let file = File::create(self.path.join("ballast")).unwrap();
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes).unwrap();
    }

    /// Gives them back.
    pub fn release(&self) {
        std::fs::remove_file(self.path.join("ballast")).unwrap();
    }

    /// Bytes that are free.
    pub fn free_bytes(&self) -> u64 {
        let stat = rustix::fs::statvfs(&self.path).unwrap();
        stat.f_bavail * stat.f_frsize
    }

    fn writes(&self) -> Writes {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let path = self.path.to_str().unwrap();
        let mut sources = mounts.lines().filter(|line| line.split(' ').nth(1) == Some(path));
        let source = sources.next_back().and_then(|line| line.split(' ').next()).unwrap_or_default();
        let name = source.strip_prefix("/dev/").unwrap_or_else(|| panic!("{path} is on {source:?}"));
        let stat = std::fs::read_to_string(format!("/sys/block/{name}/stat")).unwrap();
        let numbers: Vec<u64> = stat.split_whitespace().map(|number| number.parse().unwrap()).collect();
        Writes { done: numbers[4], flushed: numbers.get(15).copied(), in_flight: numbers[8] }
    }
}

/// What a loop device has been asked: Linux's `Documentation/block/stat.rst` has the columns.
#[derive(PartialEq, Eq)]
struct Writes {
    done: u64,
    flushed: Option<u64>,
    in_flight: u64,
}

impl Drop for Device {
    fn drop(&mut self) {
        let unmount = |lazily: &[&str]| {
            let mut command = Command::new("umount");
            let done = command.args(lazily).arg(&self.path).stderr(Stdio::null()).status();
            done.is_ok_and(|status| status.success())
        };
        // Processes that were killed may still be on their way out.
        let limit = Instant::now() + Duration::from_secs(5);
        while !unmount(&[]) {
            if Instant::now() > limit {
                unmount(&["--lazy"]);
                break;
            }
            sleep(Duration::from_millis(20));
        }
        let _ = std::fs::remove_file(&self.image);
    }
}
