//! Compiles the `.proto` files in pure Rust, so that no `protoc` is needed.

use prost::Message;
use std::{env, fs, path::PathBuf};

fn main() {
    println!("cargo:rerun-if-changed=proto");
    let files = ["store", "raft", "coordinator", "node"].map(|name| format!("proto/heddle/v1/{name}.proto"));
    let descriptors = protox::compile(files, ["proto"]).expect("the .proto files compile");
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets OUT_DIR"));
    fs::write(out.join("heddle.fds"), descriptors.encode_to_vec()).expect("write descriptors");
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors).expect("generate the gRPC code");
}
