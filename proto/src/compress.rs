//! zstd with contexts that a thread keeps: making one costs more than a small block.

use std::cell::RefCell;
use zstd::bulk::{Compressor, Decompressor};

thread_local! {
    static COMPRESSORS: RefCell<Vec<(i32, Compressor<'static>)>> = const { RefCell::new(Vec::new()) };
    static DECOMPRESSOR: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Compresses at a level.
///
/// Panics if zstd can't have memory.
pub fn compress(bytes: &[u8], level: i32) -> Vec<u8> {
    COMPRESSORS.with_borrow_mut(|kept| {
        let at = kept.iter().position(|(of, _)| *of == level).unwrap_or_else(|| {
            kept.push((level, Compressor::new(level).expect("zstd has memory for a context")));
            kept.len() - 1
        });
        kept[at].1.compress(bytes).expect("zstd compresses to memory")
    })
}

/// Decompresses what is at most `bytes_max` long; `None` if it is longer, or not zstd's.
pub fn decompress(bytes: &[u8], bytes_max: usize) -> Option<Vec<u8>> {
    DECOMPRESSOR.with_borrow_mut(|kept| {
        if kept.is_none() {
            *kept = Some(Decompressor::new().ok()?);
        }
        // What is said to be shorter is given no more: the bytes are kept as they come.
        let said = zstd::zstd_safe::get_frame_content_size(bytes).ok().flatten();
        let room = said.map_or(bytes_max, |said| bytes_max.min(usize::try_from(said).unwrap_or(bytes_max)));
        kept.as_mut()?.decompress(bytes, room).ok()
    })
}
