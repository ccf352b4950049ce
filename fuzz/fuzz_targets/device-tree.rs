//! See `heddle_tests::formats`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| heddle_tests::formats::check("device-tree", bytes));
