//! Real QEMU, as far as it is pure: its log's format, what is fed to it, its
//! snapshots' format, its command line. Processes and files are the node's.

pub mod command;
pub mod feed;
pub mod log;
mod options;
pub mod recorded;
pub mod roles;
pub mod vmstate;
