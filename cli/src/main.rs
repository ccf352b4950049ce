//! `heddle`: the one binary.

use std::process::ExitCode;

/// The store's buffers are large and short-lived: glibc's allocator gives each back to the
/// system, and page faults then cost an eighth of the append path's throughput.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    heddle_cli::main()
}
