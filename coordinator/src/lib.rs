//! The coordinator: cuts recordings into spans, leases them to nodes, gathers
//! verdicts, hunts divergences, and cuts recordings whose recorder has died.
//!
//! [`plan`], [`scheduler`] and [`hunt`] are pure; [`service`] keeps their state in
//! the store's meta rows, written before anything is answered. How a replay works
//! this crate does not know.
#![forbid(unsafe_code)]

pub mod hunt;
pub mod job;
pub mod plan;
pub mod recorders;
pub mod scheduler;
pub mod service;

pub use service::{Coordinator, CoordinatorConfig};
