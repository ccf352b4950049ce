//! The binary's parts: client commands, the three servers, the all-in-one.
//!
//! A library so that the tests can start clusters as the binary does.
#![forbid(unsafe_code)]

pub mod args;
pub mod bench;
pub mod certificates;
pub mod cluster;
pub mod commands;
mod demo;
pub mod exit;
pub mod local;
pub mod output;
pub mod progress;
mod serve;
mod telemetry;

use clap::Parser;
use std::process::ExitCode;

/// Runs the command line; its exit code.
pub fn main() -> ExitCode {
    let args = args::Args::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            output::say(format_args!("heddle: start the runtime: {error}"));
            return ExitCode::from(exit::UNEXPECTED);
        }
    };
    let code = runtime.block_on(async {
        let telemetry = telemetry::start();
        let code = match commands::run(args).await {
            Ok(code) => code,
            Err(error) => {
                let code = exit::code_of(&error);
                if code != exit::OK {
                    output::say(format_args!("heddle: {error:#}"));
                }
                code
            }
        };
        telemetry.stop().await;
        code
    });
    // A thread that waits for the terminal's next line must not keep us.
    runtime.shutdown_background();
    ExitCode::from(code)
}
