//! A Merkle tree over pages: only dirty parts are rehashed, and its nodes are
//! the blocks of a snapshot.
//!
//! A page of zeros, and a node over such pages only, has the hash [`Hash::ZERO`]
//! and no block. (In a tree over what differs from something else, it is a page that does not
//! differ, and a page of zeros has the hash of its bytes.) A node's block is the hashes of its (at most 128) children.

use crate::page_hash::page_hashes;
use heddle_proto::Hash;
use std::collections::BTreeSet;

/// Children of a node: 128 hashes are one 4 KiB block.
pub const FANOUT: usize = 128;

/// Nodes that are copied to be hashed.
const HASHED_TOGETHER: usize = 256;

/// Hashes of pages, and of nodes over them, bottom-up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageTree {
    levels: Vec<Vec<Hash>>,
    /// Pages changed since the last [`PageTree::take_changed`], a bit each.
    changed: Vec<u64>,
}

/// Asked for blocks by hash; every answer is checked against it.
pub trait BlockSource {
    /// The blocks, in the order asked. An error says which could not be had.
    fn blocks(&mut self, hashes: &[Hash]) -> Result<Vec<Vec<u8>>, String>;
}

impl PageTree {
    /// A tree over `pages` pages of zeros.
    pub fn new(pages: usize) -> PageTree {
        let mut levels = vec![vec![Hash::ZERO; pages.max(1)]];
        while levels[levels.len() - 1].len() > 1 {
            let above = levels[levels.len() - 1].len().div_ceil(FANOUT);
            levels.push(vec![Hash::ZERO; above]);
        }
        PageTree { levels, changed: vec![0; pages.div_ceil(64)] }
    }

    /// The root hash.
    pub fn root(&self) -> Hash {
        self.levels[self.levels.len() - 1][0]
    }

    /// The hash of a page.
    pub fn page(&self, page: u32) -> Hash {
        self.levels[0][page as usize]
    }

    /// Takes new hashes for some pages and rehashes the nodes above them.
    pub fn update(&mut self, pages: impl IntoIterator<Item = (u32, Hash)>) {
        let mut dirty = vec![];
        for (page, hash) in pages {
            let page = page as usize;
            if self.levels[0][page] != hash {
                self.levels[0][page] = hash;
                self.changed[page / 64] |= 1 << (page % 64);
                dirty.push(page);
            }
        }
        for level in 1..self.levels.len() {
            dirty = above(dirty);
            for part in dirty.chunks(HASHED_TOGETHER) {
                let nodes: Vec<Vec<u8>> =
                    part.iter().map(|node| concat(self.children(level, *node))).collect();
                for (node, hash) in page_hashes(part.iter().zip(nodes.iter().map(Vec::as_slice))) {
                    self.levels[level][*node] = hash;
                }
            }
        }
    }

    fn children(&self, level: usize, node: usize) -> &[Hash] {
        let below = &self.levels[level - 1];
        &below[node * FANOUT..below.len().min((node + 1) * FANOUT)]
    }

    /// Pages changed since the last call.
    pub fn take_changed_pages(&mut self) -> Vec<u32> {
        let mut pages = vec![];
        for (at, word) in self.changed.iter_mut().enumerate() {
            let mut left = std::mem::take(word);
            while left != 0 {
                pages.push(at as u32 * 64 + left.trailing_zeros());
                left &= left - 1;
            }
        }
        pages
    }

    /// The same, and the blocks of all nodes above them.
    pub fn take_changed(&mut self) -> (Vec<u32>, Vec<(Hash, Vec<u8>)>) {
        let pages = self.take_changed_pages();
        let mut nodes: Vec<usize> = pages.iter().map(|page| *page as usize).collect();
        let mut blocks = vec![];
        for level in 1..self.levels.len() {
            nodes = above(nodes);
            for node in &nodes {
                let hash = self.levels[level][*node];
                if hash != Hash::ZERO {
                    blocks.push((hash, concat(self.children(level, *node))));
                }
            }
        }
        (pages, blocks)
    }

    /// What has changed so far is not for [`PageTree::take_changed`] to tell.
    pub fn forget_changed(&mut self) {
        self.changed.fill(0);
    }

    /// The hashes of all pages under this root.
    pub fn leaves(pages: usize, root: Hash, source: &mut dyn BlockSource) -> Result<Vec<Hash>, String> {
        PageTree::nodes(pages, root, source).map(|mut tree| std::mem::take(&mut tree.levels[0]))
    }

    /// The hashes of all blocks under this root: nodes and pages. What this takes is bounded by
    /// the blocks that are there, not by the number of pages that somebody claims.
    pub fn blocks(pages: usize, root: Hash, source: &mut dyn BlockSource) -> Result<Vec<Hash>, String> {
        // Pages that a node of this level can have below it. Over one page there is no node:
        // the root is the page.
        let mut span = 1;
        while span < pages {
            span *= FANOUT;
        }
        let mut all = vec![];
        // Each node of a level, by its hash and the pages below it, once.
        let mut level = BTreeSet::from([(root, pages.max(1))]);
        while span > 1 {
            let below = span / FANOUT;
            let nodes: Vec<(Hash, usize)> =
                level.into_iter().filter(|(hash, _)| *hash != Hash::ZERO).collect();
            level = BTreeSet::new();
            for batch in nodes.chunks(FANOUT) {
                let hashes: Vec<Hash> = batch.iter().map(|(hash, _)| *hash).collect();
                for ((_, pages), bytes) in batch.iter().zip(source.blocks(&hashes)?) {
                    let mut left = *pages;
                    for child in children_in(&bytes, pages.div_ceil(below))? {
                        level.insert((child, left.min(below)));
                        left -= left.min(below);
                    }
                }
                all.extend(hashes);
            }
            span = below;
        }
        all.extend(level.into_iter().map(|(hash, _)| hash).filter(|hash| *hash != Hash::ZERO));
        Ok(all)
    }

    /// Rebuilds the tree with this root, and gives every page that has a block.
    pub fn restore(
        pages: usize,
        root: Hash,
        source: &mut dyn BlockSource,
        mut page: impl FnMut(u32, &[u8]) -> Result<(), String>,
    ) -> Result<PageTree, String> {
        let tree = PageTree::nodes(pages, root, source)?;
        let wanted: Vec<u32> = (0..pages as u32).filter(|page| tree.page(*page) != Hash::ZERO).collect();
        for batch in wanted.chunks(FANOUT) {
            let hashes: Vec<Hash> = batch.iter().map(|page| tree.page(*page)).collect();
            for (index, bytes) in batch.iter().zip(source.blocks(&hashes)?) {
                page(*index, &bytes)?;
            }
        }
        Ok(tree)
    }

    /// The tree with this root, without its pages.
    fn nodes(pages: usize, root: Hash, source: &mut dyn BlockSource) -> Result<PageTree, String> {
        let mut tree = PageTree::new(pages);
        let top = tree.levels.len() - 1;
        tree.levels[top][0] = root;
        for level in (1..=top).rev() {
            let wanted: Vec<usize> = (0..tree.levels[level].len())
                .filter(|node| tree.levels[level][*node] != Hash::ZERO)
                .collect();
            for batch in wanted.chunks(FANOUT) {
                let hashes: Vec<Hash> = batch.iter().map(|node| tree.levels[level][*node]).collect();
                for (node, bytes) in batch.iter().zip(source.blocks(&hashes)?) {
                    let from = node * FANOUT;
                    let len = tree.children(level, *node).len();
                    tree.levels[level - 1][from..from + len].copy_from_slice(&children_in(&bytes, len)?);
                }
            }
        }
        Ok(tree)
    }
}

/// The hashes of a node's block, which must have `count`.
fn children_in(block: &[u8], count: usize) -> Result<Vec<Hash>, String> {
    if block.len() != count * 32 {
        return Err(format!("a tree node has {} bytes, not {}", block.len(), count * 32));
    }
    Ok(block.chunks_exact(32).map(|hash| Hash(hash.try_into().expect("chunks of 32 bytes"))).collect())
}

fn concat(hashes: &[Hash]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(hashes.len() * 32);
    hashes.iter().for_each(|hash| bytes.extend_from_slice(&hash.0));
    bytes
}

/// The nodes over these, each once, ascending.
fn above(mut nodes: Vec<usize>) -> Vec<usize> {
    nodes.iter_mut().for_each(|node| *node /= FANOUT);
    nodes.sort_unstable();
    nodes.dedup();
    nodes
}
