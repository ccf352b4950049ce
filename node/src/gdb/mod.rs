//! A gdb remote server over a debugger's session: forwards, backwards, and no writes.
//!
//! gdb speaks to [`serve`] over a stream; [`target`] answers with what the session shows, and
//! [`threads`] for each of several harts.
//! The protocol is the crate `gdbstub`'s.

mod riscv;
mod target;
mod threads;

use anyhow::{Context, Result, bail};
use gdbstub::conn::{Connection, ConnectionExt};
use gdbstub::stub::run_blocking::{BlockingEventLoop, Event, WaitForStopReasonError};
use gdbstub::stub::{DisconnectReason, GdbStub, MultiThreadStopReason};
use gdbstub::target::Target;
use heddle_replay_engine::debugger::Session;
use std::io;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use target::Debuggee;

/// One gdb, by whatever way it came.
type Caller = Box<dyn ConnectionExt<Error = io::Error>>;

/// Where a gdb can come in.
pub enum Door {
    /// A Unix socket: whoever may open it.
    Unix(UnixListener),
    /// A port, in clear: whoever reaches it.
    Tcp(TcpListener),
}

impl Door {
    fn accept(&self) -> io::Result<Caller> {
        Ok(match self {
            Door::Unix(listener) => Box::new(listener.accept()?.0),
            Door::Tcp(listener) => Box::new(listener.accept()?.0),
        })
    }
}

/// Serves one gdb after the other, each from where the last one left, until one says `kill`.
pub fn serve(door: &Door, session: Session) -> Result<()> {
    let mut debuggee = Debuggee::new(session);
    loop {
        let caller = door.accept().context("wait for gdb")?;
        match GdbStub::new(caller).run_blocking::<Loop>(&mut debuggee) {
            Ok(DisconnectReason::Kill) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.is_target_error() => bail!("{error}"),
            // Gone without a word, or no gdb: the next one may be better.
            Err(error) if error.is_connection_error() => {}
            Err(error) => tracing::warn!(%error, "gdb is not understood"),
        }
        debuggee.forget_points();
    }
}

/// Who waits for the session, and for gdb meanwhile.
enum Loop {}

impl BlockingEventLoop for Loop {
    type Target = Debuggee;
    type Connection = Caller;
    type StopReason = MultiThreadStopReason<u64>;

    fn wait_for_stop_reason(
        target: &mut Debuggee,
        conn: &mut Caller,
    ) -> Result<
        Event<Self::StopReason>,
        WaitForStopReasonError<<Debuggee as Target>::Error, <Caller as Connection>::Error>,
    > {
        let mut failed = None;
        let mut is_interrupted = || match conn.peek() {
            Ok(byte) => byte.is_some(),
            Err(error) => {
                failed = Some(error);
                true
            }
        };
        let stopped = match target.go(&mut is_interrupted) {
            Ok(stopped) => stopped,
            Err(error) => return Err(WaitForStopReasonError::Target(error)),
        };
        if let Some(error) = failed {
            return Err(WaitForStopReasonError::Connection(error));
        }
        match stopped {
            Some(reason) => Ok(Event::TargetStopped(reason)),
            None => conn.read().map(Event::IncomingData).map_err(WaitForStopReasonError::Connection),
        }
    }

    fn on_interrupt(target: &mut Debuggee) -> Result<Option<Self::StopReason>, <Debuggee as Target>::Error> {
        Ok(Some(target.interrupted()))
    }
}

#[cfg(test)]
mod tests;
