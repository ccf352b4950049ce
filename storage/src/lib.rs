//! The log store: recordings' chunks and blocks, on a majority's disks before they are
//! acknowledged.
//!
//! A write goes [`service`] > [`core`] (Raft, a group for each shard) > [`journal`] (fsynced,
//! and the bytes' only home) > [`apply`] (rows) > [`catalog`] (rebuildable). [`core`] is the
//! replica without its surroundings, [`replica`] gives it threads, and simulations a seed.
//! The store reads chunk headers only; what an event means it does not know.
#![forbid(unsafe_code)]

pub mod apply;
pub mod catalog;
pub mod channel;
pub mod client;
pub mod command;
pub mod core;
pub mod disk;
pub mod error;
mod found_log;
pub mod group;
pub mod install;
pub mod journal;
pub mod keeper;
mod keeping;
mod members;
pub mod mend;
mod peers;
pub mod placement;
pub mod raft_log;
mod reconcile;
pub mod recover;
mod references;
pub mod replica;
mod rewrite;
pub mod rows;
pub mod schema;
mod scrub;
pub mod server;
pub mod service;
mod streams;
pub mod tls;
pub mod transport;
pub mod writer;

pub use client::{Route, StoreClient, StoreError};
pub use server::{Replica, ReplicaConfig};
