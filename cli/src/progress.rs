//! Progress on stderr: a bar on a terminal, plain lines elsewhere.

use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Plain lines come no more often than this.
const LINE_EVERY: Duration = Duration::from_secs(2);

/// Progress of one thing.
pub struct Progress {
    what: String,
    bar: Option<ProgressBar>,
    total: u64,
    last: Instant,
}

impl Progress {
    /// Progress of `what` towards `total`; zero if that is not known.
    pub fn new(what: &str, total: u64) -> Progress {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = if total == 0 { ProgressBar::new_spinner() } else { ProgressBar::new(total) };
            let shape =
                if total == 0 { "{spinner} {prefix} {msg}" } else { "{prefix} {bar:30} {percent}% {msg}" };
            if let Ok(style) = ProgressStyle::with_template(shape) {
                bar.set_style(style);
            }
            bar.set_prefix(what.to_string());
            bar
        });
        Progress { what: what.into(), bar, total, last: Instant::now() }
    }

    /// It is at `position`, and `detail` says more.
    pub fn at(&mut self, position: u64, detail: &str) {
        match &self.bar {
            Some(bar) => {
                bar.set_position(position);
                bar.set_message(detail.to_string());
            }
            None if self.last.elapsed() >= LINE_EVERY => {
                self.last = Instant::now();
                match self.total {
                    0 => eprintln!("{}: {detail}", self.what),
                    total => eprintln!("{}: {}% {detail}", self.what, position * 100 / total),
                }
            }
            None => {}
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
