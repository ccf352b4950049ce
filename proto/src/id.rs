//! Identifiers: newtypes over bytes, written as lower-case hex.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::{fmt, str::FromStr};

/// A recording's id: 16 bytes made by the client that opens it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct RecordingId(pub [u8; 16]);

/// A BLAKE3 hash: the name of a block or chunk, or a digest.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Hash(pub [u8; 32]);

/// The text or bytes do not have an id's length or alphabet.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("not an id: expected {expected} hex digits, got {got:?}")]
pub struct IdError {
    expected: usize,
    got: String,
}

impl Hash {
    /// The hash that stands for "nothing there".
    pub const ZERO: Hash = Hash([0; 32]);

    /// The BLAKE3 hash of `bytes`.
    pub fn of(bytes: &[u8]) -> Hash {
        Hash(*blake3::hash(bytes).as_bytes())
    }
}

macro_rules! hex_id {
    ($name:ident, $len:expr) => {
        impl $name {
            /// Takes the id from raw bytes, as they travel on the wire.
            pub fn from_slice(bytes: &[u8]) -> Result<Self, IdError> {
                bytes
                    .try_into()
                    .map($name)
                    .map_err(|_| IdError { expected: $len * 2, got: format!("{} bytes", bytes.len()) })
            }
            /// The raw bytes.
            pub fn to_vec(self) -> Vec<u8> {
                self.0.to_vec()
            }
            /// The first eight hex digits, enough for people.
            pub fn short(&self) -> String {
                self.to_string()[..8].to_string()
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                let bad = || IdError { expected: $len * 2, got: text.to_string() };
                // A sign, which from_str_radix takes, is no digit.
                if text.len() != $len * 2 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                    return Err(bad());
                }
                let mut out = [0; $len];
                for (i, byte) in out.iter_mut().enumerate() {
                    *byte = u8::from_str_radix(&text[i * 2..i * 2 + 2], 16).map_err(|_| bad())?;
                }
                Ok($name(out))
            }
        }
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                // Text for people's formats, bytes for ours.
                if s.is_human_readable() { s.serialize_str(&self.to_string()) } else { self.0.serialize(s) }
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                if d.is_human_readable() {
                    String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
                } else {
                    <[u8; $len]>::deserialize(d).map($name)
                }
            }
        }
    };
}
hex_id!(RecordingId, 16);
hex_id!(Hash, 32);
