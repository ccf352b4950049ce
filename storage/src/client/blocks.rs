//! Blocks: stored where their hash says, several requests at a time.

use super::{BLOCKS_BYTES, Client, RETRY, Route, StoreClient, StoreError, UPLOADS};
use crate::placement::block_shard;
use crate::service::{BLOCK_BYTES_MAX, compress_block};
use bytes::Bytes;
use heddle_proto::compress::decompress;
use heddle_proto::{Hash, RecordingId, v1};
use std::collections::{BTreeMap, HashSet};
use tokio::task::JoinSet;
use tokio::time::Instant;

impl StoreClient {
    /// Stores the blocks that the store lacks, and notes that `owner` refers to them all;
    /// the number and compressed bytes sent.
    pub async fn put_blocks(
        &self,
        owner: RecordingId,
        blocks: Vec<(Hash, Bytes)>,
    ) -> Result<(u64, u64), StoreError> {
        let shards = self.shards().await?;
        let mut by_shard: BTreeMap<u32, Vec<(Hash, Bytes)>> = BTreeMap::new();
        for block in blocks {
            by_shard.entry(block_shard(block.0, shards)).or_default().push(block);
        }
        let mut groups: Vec<(u32, Vec<(Hash, Bytes)>)> = vec![];
        for (shard, blocks) in by_shard {
            groups.extend(batches(blocks).into_iter().map(|group| (shard, group)));
        }
        let mut sent = (0, 0);
        let mut running = JoinSet::new();
        let mut groups = groups.into_iter();
        loop {
            while running.len() < UPLOADS
                && let Some((shard, group)) = groups.next()
            {
                let client = self.clone();
                running.spawn(async move { client.put_group(owner, shard, group).await });
            }
            let Some(done) = running.join_next().await else { return Ok(sent) };
            let done = done.map_err(|error| StoreError::Unavailable(error.to_string()))??;
            sent = (sent.0 + done.0, sent.1 + done.1);
        }
    }

    async fn put_group(
        &self,
        owner: RecordingId,
        shard: u32,
        group: Vec<(Hash, Bytes)>,
    ) -> Result<(u64, u64), StoreError> {
        let hashes: Vec<Bytes> = group.iter().map(|(hash, _)| hash.to_vec().into()).collect();
        let owner: Bytes = owner.to_vec().into();
        let request = v1::PinRequest { owner: owner.clone(), shard, hashes };
        let pin = |mut client: Client| {
            let request = request.clone();
            async move { client.pin_blocks(request).await }
        };
        let missing: HashSet<Bytes> = self.call(Route::Shard(shard), pin).await?.hashes.into_iter().collect();
        let wanted: Vec<(Hash, Bytes)> =
            group.into_iter().filter(|(hash, _)| missing.contains(&hash.0[..])).collect();
        if wanted.is_empty() {
            return Ok((0, 0));
        }
        let blocks: Vec<v1::Block> = wanted
            .iter()
            .map(|(hash, data)| v1::Block { hash: hash.to_vec().into(), data: compress_block(data) })
            .collect();
        let sent = (blocks.len() as u64, blocks.iter().map(|block| block.data.len() as u64).sum::<u64>());
        let request = v1::PutBlocksRequest { blocks, owner, shard };
        let put = |mut client: Client| {
            let request = request.clone();
            async move { client.put_blocks(request).await }
        };
        self.call(Route::Shard(shard), put).await?;
        Ok(sent)
    }

    /// Blocks by hash, in order, each checked against it.
    pub async fn get_blocks(&self, hashes: &[Hash]) -> Result<Vec<Bytes>, StoreError> {
        let until = Instant::now() + self.patience;
        loop {
            match self.try_get_blocks(hashes).await {
                Err(StoreError::Unavailable(_)) if Instant::now() < until => tokio::time::sleep(RETRY).await,
                done => return done,
            }
        }
    }

    async fn try_get_blocks(&self, hashes: &[Hash]) -> Result<Vec<Bytes>, StoreError> {
        let request = v1::BlockHashes { hashes: hashes.iter().map(|h| h.to_vec().into()).collect() };
        // Any replica has every block.
        let route = Route::Shard(0);
        let tried = self.tried(route);
        let lost = |status| self.transient(route, tried, status);
        let mut client = self.number(tried)?;
        let stream = self.in_time(client.get_blocks(request)).await.map_err(lost)?;
        let mut stream = stream.into_inner();
        let mut blocks = Vec::with_capacity(hashes.len());
        for hash in hashes {
            let block = stream.message().await.map_err(lost)?;
            let block =
                block.ok_or_else(|| StoreError::Unavailable("the stream of blocks ended early".into()))?;
            let raw = decompress(&block.data, BLOCK_BYTES_MAX)
                .ok_or_else(|| StoreError::Corrupt(format!("block {hash} does not decompress")))?;
            if Hash::of(&raw) != *hash {
                return Err(StoreError::Corrupt(format!("block {hash} has other bytes")));
            }
            blocks.push(Bytes::from(raw));
        }
        Ok(blocks)
    }
}

fn batches(blocks: Vec<(Hash, Bytes)>) -> Vec<Vec<(Hash, Bytes)>> {
    let mut groups: Vec<Vec<(Hash, Bytes)>> = vec![];
    let mut bytes = BLOCKS_BYTES;
    for block in blocks {
        if bytes >= BLOCKS_BYTES {
            groups.push(vec![]);
            bytes = 0;
        }
        bytes += block.1.len();
        groups.last_mut().expect("pushed above").push(block);
    }
    groups
}
