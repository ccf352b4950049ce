//! Files and snapshots as blocks in the store.

use anyhow::{Context, Result, anyhow, ensure};
use bytes::Bytes;
use heddle_proto::manifest::{Image, MachineSpec};
use heddle_proto::{Hash, RecordingId};
use heddle_replay_engine::machine::loader::Images;
use heddle_replay_engine::page_tree::BlockSource;
use heddle_storage::StoreClient;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::runtime::Handle;

/// Bytes of an image's block.
const IMAGE_BLOCK_BYTES: usize = 64 << 10;
/// Hashes in an image's index; a longer image has an index of indexes.
const INDEX_HASHES: usize = 8192;
/// Largest image: an index of indexes of blocks, more than any guest here needs.
pub const IMAGE_BYTES_MAX: u64 = 4 << 30;
/// Bytes of blocks a node keeps in memory, and of images; beyond it all are forgotten.
const CACHE_BYTES_MAX: usize = 512 << 20;

/// Stores a file that a recording refers to; each hash is stored once, whatever file it
/// comes from, and stays while any recording refers to it.
pub async fn put_image(store: &StoreClient, owner: RecordingId, name: &str, bytes: &Bytes) -> Result<Image> {
    ensure!(
        bytes.len() as u64 <= IMAGE_BYTES_MAX,
        "{name} has {} bytes; at most {IMAGE_BYTES_MAX} can be stored",
        bytes.len()
    );
    let blocks: Vec<(Hash, Bytes)> = (0..bytes.len())
        .step_by(IMAGE_BLOCK_BYTES)
        .map(|at| {
            let block = bytes.slice(at..bytes.len().min(at + IMAGE_BLOCK_BYTES));
            (Hash::of(&block), block)
        })
        .collect();
    let indexes: Vec<(Hash, Bytes)> = blocks
        .chunks(INDEX_HASHES)
        .map(|part| {
            let bytes = Bytes::from(part.iter().flat_map(|(hash, _)| hash.0).collect::<Vec<u8>>());
            (Hash::of(&bytes), bytes)
        })
        .collect();
    let top = Bytes::from(indexes.iter().flat_map(|(hash, _)| hash.0).collect::<Vec<u8>>());
    let index = Hash::of(&top);
    let mut all = blocks;
    all.extend(indexes);
    all.push((index, top));
    store.put_blocks(owner, all).await.with_context(|| format!("store {name}"))?;
    Ok(Image { hash: Hash::of(bytes), bytes: bytes.len() as u64, index, name: name.into() })
}

fn hashes(bytes: &[u8]) -> Result<Vec<Hash>> {
    ensure!(bytes.len() % 32 == 0, "an index block is not a list of hashes");
    Ok(bytes.chunks_exact(32).map(|hash| Hash(hash.try_into().expect("chunks of 32"))).collect())
}

/// The hashes of all blocks of a file.
pub fn image_blocks(image: &Image, source: &mut dyn BlockSource) -> Result<Vec<Hash>> {
    ensure!(image.bytes <= IMAGE_BYTES_MAX, "{} is too large", image.name);
    let parts = image.bytes.div_ceil(IMAGE_BLOCK_BYTES as u64);
    let mut blocks = vec![image.index];
    let mut level = vec![image.index];
    // How many there must be is known before they are read: a list may name one block often.
    for expected in [parts.div_ceil(INDEX_HASHES as u64), parts] {
        let mut below = vec![];
        for block in source.blocks(&level).map_err(|error| anyhow!(error))? {
            below.extend(hashes(&block)?);
        }
        let what = "has another number of blocks than its length asks for";
        ensure!(below.len() as u64 == expected, "{} {what}", image.name);
        blocks.extend(&below);
        level = below;
    }
    Ok(blocks)
}

/// Blocks from the store, through a cache that a node's tasks share.
#[derive(Clone)]
pub struct BlockCache {
    store: StoreClient,
    cache: Arc<Mutex<Cache>>,
    runtime: Handle,
}

#[derive(Default)]
struct Cache {
    blocks: HashMap<Hash, Bytes>,
    images: HashMap<Hash, Arc<[u8]>>,
    /// Of the blocks.
    bytes: usize,
}

impl Cache {
    /// Keeps an image, beside others as long as all have at most so many bytes.
    fn keep_image(&mut self, hash: Hash, image: Arc<[u8]>, bytes_max: usize) {
        let kept: usize = self.images.values().map(|image| image.len()).sum();
        if kept.saturating_add(image.len()) > bytes_max {
            self.images.clear();
        }
        self.images.insert(hash, image);
    }
}

impl BlockCache {
    /// An empty cache over `store`.
    pub fn new(store: StoreClient) -> BlockCache {
        BlockCache { store, cache: Arc::default(), runtime: Handle::current() }
    }

    /// A cache that already has `blocks`.
    pub fn with(store: StoreClient, blocks: Vec<(Hash, Bytes)>) -> BlockCache {
        let cache = BlockCache::new(store);
        cache.cache.lock().unwrap_or_else(PoisonError::into_inner).blocks.extend(blocks);
        cache
    }

    /// Blocks by hash, in order.
    pub async fn get(&self, wanted: &[Hash]) -> Result<Vec<Bytes>> {
        let missing: Vec<Hash> = {
            let cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
            wanted.iter().filter(|hash| !cache.blocks.contains_key(hash)).copied().collect()
        };
        let mut fetched: HashMap<Hash, Bytes> = HashMap::new();
        if !missing.is_empty() {
            let blocks = self.store.get_blocks(&missing).await?;
            fetched.extend(missing.into_iter().zip(blocks));
        }
        // Forgotten between the look and the lock, by another task: ask the store again.
        match self.take(wanted, fetched) {
            Some(blocks) => Ok(blocks),
            None => Ok(self.store.get_blocks(wanted).await?),
        }
    }

    fn take(&self, wanted: &[Hash], fetched: HashMap<Hash, Bytes>) -> Option<Vec<Bytes>> {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let found =
            wanted.iter().map(|hash| fetched.get(hash).or_else(|| cache.blocks.get(hash)).cloned()).collect();
        if cache.bytes > CACHE_BYTES_MAX {
            cache.blocks.clear();
            cache.bytes = 0;
        }
        for (hash, bytes) in fetched {
            cache.bytes += bytes.len();
            cache.blocks.insert(hash, bytes);
        }
        found
    }

    /// A stored file, whole, checked against its hash.
    pub async fn image(&self, image: &Image) -> Result<Arc<[u8]>> {
        if let Some(bytes) = self.cache.lock().unwrap_or_else(PoisonError::into_inner).images.get(&image.hash)
        {
            return Ok(bytes.clone());
        }
        ensure!(image.bytes <= IMAGE_BYTES_MAX, "{} is too large", image.name);
        let top = self.get(&[image.index]).await.with_context(|| format!("fetch {}", image.name))?;
        let mut bytes = Vec::with_capacity(image.bytes as usize);
        for index in self.get(&hashes(&top[0])?).await? {
            for part in hashes(&index)?.chunks(128) {
                for block in self.store.get_blocks(part).await? {
                    // A list may name one block often: no more is kept than the image has.
                    let is_within = (bytes.len() + block.len()) as u64 <= image.bytes;
                    ensure!(is_within, "{} has more blocks than its length asks for", image.name);
                    bytes.extend_from_slice(&block);
                }
            }
        }
        ensure!(
            bytes.len() as u64 == image.bytes && Hash::of(&bytes) == image.hash,
            "{} does not have the hash that the manifest names",
            image.name
        );
        let bytes: Arc<[u8]> = Arc::from(bytes);
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        cache.keep_image(image.hash, bytes.clone(), CACHE_BYTES_MAX);
        Ok(bytes)
    }

    /// All files of a machine.
    pub async fn images(&self, spec: &MachineSpec) -> Result<Images> {
        let mut images = Images::default();
        for (slot, image) in [
            (&mut images.bios, &spec.bios),
            (&mut images.kernel, &spec.kernel),
            (&mut images.initrd, &spec.initrd),
            (&mut images.dtb, &spec.dtb),
        ] {
            if let Some(image) = image {
                *slot = Some(self.image(image).await?);
            }
        }
        for drive in &spec.drives {
            images.drives.push(self.image(drive).await?);
        }
        Ok(images)
    }
}

/// Called from a replay's own thread, never from the runtime's.
impl BlockSource for BlockCache {
    fn blocks(&mut self, hashes: &[Hash]) -> Result<Vec<Vec<u8>>, String> {
        let blocks = self.runtime.block_on(self.get(hashes)).map_err(|error| format!("{error:#}"))?;
        Ok(blocks.into_iter().map(|block| block.to_vec()).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_kept_while_all_have_so_many_bytes_and_the_last_one_always() {
        let mut cache = Cache::default();
        let mut kept_after = |number: u8, bytes: usize| {
            cache.keep_image(Hash([number; 32]), Arc::from(vec![0; bytes]), 100);
            let mut kept: Vec<u8> = cache.images.keys().map(|hash| hash.0[0]).collect();
            kept.sort_unstable();
            kept
        };
        assert_eq!(kept_after(1, 60), [1]);
        assert_eq!(kept_after(2, 40), [1, 2]);
        assert_eq!(kept_after(3, 1), [3]);
        assert_eq!(kept_after(4, 101), [4]);
        assert_eq!(kept_after(5, 1), [5]);
    }
}
