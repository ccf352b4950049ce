//! The warp: how the virtual clock grows while every vCPU is idle, in two halves.
//!
//! ```text
//! iothread  start_warp_timer    checkpoint ClockWarpStart;  note VirtualRt, arm the warp timer
//! iothread  warp timer fires    checkpoint ClockVirtualRt;  wake the vCPU, nothing else
//! vcpu      account_warp_timer  checkpoint ClockWarpAccount; bias += VirtualRt since the start
//! ```
//! The account is the only place that adds to the bias, and what it adds is the
//! real time that passed: a late wake-up shows to the guest as a late timer.

use serde::{Deserialize, Serialize};

/// The warp's state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Warp {
    /// VirtualRt when the idle time began (`sleep=off`: the virtual clock then).
    pub start: Option<i64>,
    /// `sleep=off`: the virtual deadline to jump to.
    pub jump: Option<i64>,
    /// The warp timer has fired, or the jump is decided: the vCPU must account.
    pub wake: bool,
}
