//! Builds of the built-in machine: the real one, and ones with a planted fault,
//! for tests and the demo of the hunt.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The build that this binary contains. The version goes up with every change to what a guest
/// does: a recording replays on the build that made it.
pub const BUILTIN: &str = concat!("builtin-", env!("CARGO_PKG_VERSION"));

/// One bit of one register flips after so many instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// The first icount at which the state differs.
    pub icount: u64,
    /// x1 to x31.
    pub register: u8,
    /// 0 to 63.
    pub bit: u8,
}

/// A build a node can run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Build {
    /// What makes it differ from the real one.
    pub fault: Option<Fault>,
}

/// The name is not one of a build this binary has.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("no build {0:?} here; this binary has {BUILTIN}, and {BUILTIN}+flip:ICOUNT:xN:BIT")]
pub struct UnknownBuild(String);

impl fmt::Display for Build {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(BUILTIN)?;
        match self.fault {
            None => Ok(()),
            Some(Fault { icount, register, bit }) => write!(f, "+flip:{icount}:x{register}:{bit}"),
        }
    }
}

impl FromStr for Build {
    type Err = UnknownBuild;
    fn from_str(name: &str) -> Result<Build, UnknownBuild> {
        let unknown = || UnknownBuild(name.to_string());
        let rest = name.strip_prefix(BUILTIN).ok_or_else(unknown)?;
        if rest.is_empty() {
            return Ok(Build::default());
        }
        let parts: Vec<&str> = rest.strip_prefix("+flip:").ok_or_else(unknown)?.split(':').collect();
        let [icount, register, bit] = parts[..] else { return Err(unknown()) };
        let fault = Fault {
            icount: icount.parse().map_err(|_| unknown())?,
            register: register
                .strip_prefix('x')
                .and_then(|n| n.parse().ok())
                .filter(|n| (1..=31).contains(n))
                .ok_or_else(unknown)?,
            bit: bit.parse().ok().filter(|bit| *bit < 64).ok_or_else(unknown)?,
        };
        Ok(Build { fault: Some(fault) })
    }
}
