//! The story that the demo prints, with times.

use std::time::Instant;

/// Prints a line for each thing that happened.
pub struct Story {
    began: Instant,
    is_silent: bool,
}

impl Story {
    /// A story that begins now; silent when the result is printed as data.
    pub fn new(is_silent: bool) -> Story {
        Story { began: Instant::now(), is_silent }
    }

    /// One thing that happened.
    pub fn say(&self, what: &str, text: &str) {
        let line = format!("{:6.1} s  {what:<10} {text}", self.began.elapsed().as_secs_f64());
        self.print(&line);
    }

    /// A divergence card.
    pub fn card(&self, card: &str) {
        let indented: Vec<String> =
            card.lines().map(|line| format!("            {line}").trim_end().to_string()).collect();
        self.print(&format!("\n{}\n", indented.join("\n")));
    }

    /// The end.
    pub fn end(&self) {
        self.say("done", "everything that was started is stopped, and its data removed unless kept");
    }

    fn print(&self, text: &str) {
        if self.is_silent {
            eprintln!("{text}");
        } else {
            println!("{text}");
        }
    }
}
