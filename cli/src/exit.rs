//! Exit codes: what a script can tell apart.

use heddle_node::record::BadRequest;
use heddle_storage::StoreError;

/// All went well.
pub const OK: u8 = 0;
/// Something unexpected.
pub const UNEXPECTED: u8 = 1;
/// The command line is wrong (clap exits with this itself).
pub const USAGE: u8 = 2;
/// A replay or comparison diverged.
pub const DIVERGED: u8 = 3;
/// Nothing matches the name or selector.
pub const NOTHING: u8 = 4;
/// Stored bytes are damaged.
pub const CORRUPT: u8 = 5;
/// Another build or version is needed.
pub const INCOMPATIBLE: u8 = 6;
/// No majority, or no coordinator, answers.
pub const NO_QUORUM: u8 = 7;
/// Not done in time.
pub const TIMEOUT: u8 = 8;

/// A guest's exit code as ours: its low byte, as a process's exit status has no more. What is
/// not 0 there must not be 0 here.
pub fn of_guest(code: u16) -> u8 {
    if code == 0 { OK } else { code.to_le_bytes()[0].max(UNEXPECTED) }
}

/// An error with a code of its own.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct Coded {
    /// The exit code.
    pub code: u8,
    /// What went wrong.
    pub text: String,
}

/// An error that ends with `code`.
pub fn coded(code: u8, text: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(Coded { code, text: text.into() })
}

fn code_of_status(status: &tonic::Status) -> u8 {
    match status.code() {
        tonic::Code::NotFound => NOTHING,
        tonic::Code::DataLoss => CORRUPT,
        tonic::Code::Unavailable | tonic::Code::Unknown | tonic::Code::Cancelled => NO_QUORUM,
        tonic::Code::DeadlineExceeded => TIMEOUT,
        tonic::Code::InvalidArgument => USAGE,
        tonic::Code::Unimplemented => INCOMPATIBLE,
        _ => UNEXPECTED,
    }
}

/// What a server refused, in its own words.
pub fn refused(who: &str, status: &tonic::Status) -> anyhow::Error {
    let code = code_of_status(status);
    let prefix = if code == NO_QUORUM { format!("{who} does not answer: ") } else { String::new() };
    coded(code, format!("{prefix}{}", status.message()))
}

/// The exit code of an error, from the first cause that has one.
pub fn code_of(error: &anyhow::Error) -> u8 {
    for cause in error.chain() {
        if let Some(coded) = cause.downcast_ref::<Coded>() {
            return coded.code;
        }
        if let Some(store) = cause.downcast_ref::<StoreError>() {
            return match store {
                StoreError::NotFound(_) => NOTHING,
                StoreError::Corrupt(_) => CORRUPT,
                StoreError::Unavailable(_) => NO_QUORUM,
                _ => UNEXPECTED,
            };
        }
        if let Some(status) = cause.downcast_ref::<tonic::Status>() {
            return code_of_status(status);
        }
        if cause.is::<BadRequest>() {
            return USAGE;
        }
        if cause.is::<heddle_replay_engine::builds::UnknownBuild>() {
            return INCOMPATIBLE;
        }
    }
    UNEXPECTED
}

#[cfg(test)]
mod tests {
    use super::*;
    use heddle_proto::manifest::ManifestError;
    use heddle_replay_engine::machine::loader::LoadError;

    #[test]
    fn a_guests_exit_code_is_ours_by_its_low_byte_and_no_failure_is_lost() {
        for (code, ours) in [(0, 0), (5, 5), (255, 255), (256, 1), (300, 44), (u16::MAX, 255)] {
            assert_eq!(of_guest(code), ours, "{code}");
        }
    }

    #[test]
    fn a_guest_that_cannot_be_is_the_command_lines_fault_and_a_stored_manifest_is_not() {
        let bound = || ManifestError::Bound { what: "shift", value: 11, rule: "at most 10" };
        let asked = anyhow::Error::new(BadRequest::from(bound()));
        assert_eq!(code_of(&asked.context("record")), USAGE);
        assert_eq!(code_of(&anyhow::Error::new(BadRequest::from(LoadError::Nothing))), USAGE);
        assert_eq!(code_of(&anyhow::Error::new(bound())), UNEXPECTED);
    }
}
