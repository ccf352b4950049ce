//! The log store: recordings' chunks and blocks, on a majority's disks before
//! they are acknowledged.
//!
//! A write goes [`service`] > [`replica`] (Raft) > [`journal`] (fsynced, and the
//! bytes' only home) > [`apply`] (rows) > [`catalog`] (sled, rebuildable). The
//! store reads chunk headers only; what an event means it does not know.
#![forbid(unsafe_code)]

pub mod apply;
pub mod catalog;
pub mod channel;
pub mod client;
pub mod command;
pub mod error;
pub mod journal;
pub mod raft_log;
pub mod replica;
mod rewrite;
pub mod server;
pub mod service;
pub mod transport;

pub use client::{StoreClient, StoreError};
pub use server::{Replica, ReplicaConfig};
