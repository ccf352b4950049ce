//! A node: runs emulators, records them live, replays spans under lease.
//!
//! [`record`] is the way out: emulator > [`chunker`] > [`outbox`] > store. [`worker`]
//! is the way back: lease > [`replay`] > verdict. What is committed, and what to
//! replay next, a node is told.
#![forbid(unsafe_code)]

pub mod blocks;
pub mod chunker;
pub mod container;
pub mod debugger;
pub mod gdb;
pub mod index;
pub mod live;
pub mod network;
pub mod outbox;
pub mod qemu;
pub mod record;
pub mod replay;
pub mod rewrite;
pub mod transfer;
pub mod upload;
pub mod worker;
