//! What can go wrong inside a replica.

use std::path::PathBuf;

/// A replica's own trouble. All of it stops the replica; none loses what was acknowledged.
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
    /// Bytes below the fsynced mark have changed.
    #[error(
        "{path} is corrupt at byte {offset}: {what}. Restore this replica's directory from a copy; the other replicas go on without it"
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// What is wrong.
        what: String,
    },
    /// The directory belongs to another replica, cluster or version.
    #[error("{path}: {what}")]
    Identity {
        /// The directory.
        path: PathBuf,
        /// What does not fit.
        what: String,
    },
    /// sled.
    #[error("catalog: {0}")]
    Catalog(#[from] sled::Error),
    /// raft-rs.
    #[error("raft: {0}")]
    Raft(#[from] raft::Error),
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
