//! Compiles the tap with the same rustc, so that it travels inside the program.

use std::path::PathBuf;
use std::process::Command;

fn main() {
    let source = "tap/tap.rs";
    println!("cargo:rerun-if-changed={source}");
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let out =
        PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo names OUT_DIR")).join("libheddle_tap.so");
    let target = std::env::var("TARGET").expect("cargo names TARGET");
    let status = Command::new(rustc)
        .args([
            "--crate-type",
            "cdylib",
            "--crate-name",
            "heddle_tap",
            "--edition",
            "2024",
            "--target",
            &target,
        ])
        .args(["-C", "opt-level=3", "-C", "panic=abort", "-C", "strip=symbols", "-o"])
        .arg(&out)
        .arg(source)
        .status()
        .expect("rustc runs");
    assert!(status.success(), "the tap does not compile");
}
