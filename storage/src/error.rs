//! What can go wrong inside a replica.

use std::path::PathBuf;

/// A replica's own trouble. But for [`Error::Full`] all of it stops the replica; none loses
/// what was acknowledged.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file system refused.
    #[error("{what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// No room for the next segment. Nothing was written; it can be tried again.
    #[error(
        "no room for {path}: {needed} bytes are needed. Free some, or delete recordings; appends go on then"
    )]
    Full {
        /// The segment.
        path: PathBuf,
        /// Bytes that must be free.
        needed: u64,
    },
    /// Bytes below the fsynced mark have changed.
    #[error(
        "{path} is corrupt at byte {offset}: {what}. The other replicas go on without this one: replace it by `heddle replica remove` and `heddle replica add` with an empty directory"
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// What is wrong.
        what: String,
    },
    /// A file of another version.
    #[error("{path} has format version {found}; this build reads {known}")]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// The directory belongs to another replica, cluster or version.
    #[error("{path}: {what}")]
    Identity {
        /// The directory.
        path: PathBuf,
        /// What does not fit.
        what: String,
    },
    /// An address that cannot be reached as it is written.
    #[error("{address}: {what}")]
    Address {
        /// The address.
        address: String,
        /// Why not.
        what: String,
    },
    /// sled.
    #[error("catalog: {0}")]
    Catalog(#[from] sled::Error),
    /// A row of the catalog that does not decode.
    #[error("catalog: {0}; stop the replica and remove its `catalog` directory: it is rebuilt")]
    Row(String),
    /// raft-rs.
    #[error("raft: {0}")]
    Raft(#[from] raft::Error),
    /// The replica has stopped.
    #[error("the replica has stopped")]
    Stopped,
}

impl Error {
    /// Whether the file system has no room.
    pub fn is_no_space(&self) -> bool {
        let full = [std::io::ErrorKind::StorageFull, std::io::ErrorKind::QuotaExceeded];
        match self {
            Error::Full { .. } => true,
            Error::Io { source, .. } => full.contains(&source.kind()),
            _ => false,
        }
    }
}

/// Attaches the file and the attempt to an I/O error.
pub trait IoContext<T> {
    /// `what` is a verb phrase: "open", "write to".
    fn at(self, what: &'static str, path: &std::path::Path) -> Result<T, Error>;
}

impl<T> IoContext<T> for std::io::Result<T> {
    fn at(self, what: &'static str, path: &std::path::Path) -> Result<T, Error> {
        self.map_err(|source| Error::Io { what, path: path.to_path_buf(), source })
    }
}
