//! `heddle`: the one binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    heddle_cli::main()
}
