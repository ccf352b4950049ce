//! A simulated cluster of the log store in one thread, from one seed.
//!
//! The shipped state machines run over a simulated disk (torn and lost writes, no room,
//! failures, bit rot), a simulated network (loss, delay, copies, other orders, partitions both
//! ways) and clocks that jump. The same seed gives the same trace.

mod checks;
mod client;
pub(crate) mod disk;
mod members;
mod replica;
mod rot;
mod world;

pub use world::{Outcome, run};
