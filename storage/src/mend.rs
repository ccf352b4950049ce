//! Reading bytes that a row names, and mending them from a peer if they have rotted.

use crate::catalog::Catalog;
use crate::channel::{MESSAGE_BYTES_MAX, connect};
use crate::core::Input;
use crate::error::Error;
use crate::install::bulk_frame;
use crate::journal::{Location, Segments};
use crate::keeper::Sink;
use crate::replica::{Handle, WriterHandle};
use crate::schema::{Key, locations};
use crate::transport::Addresses;
use bytes::Bytes;
use heddle_proto::v1;
use heddle_proto::v1::raft_transport_client::RaftTransportClient;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// A peer that does not answer in this time is not waited for.
const PATIENCE: Duration = Duration::from_secs(5);

/// Reads, and mends.
#[derive(Clone)]
pub struct Reader {
    /// The cluster's id.
    pub cluster: u64,
    /// This replica.
    pub me: u64,
    /// Where the others are.
    pub addresses: Arc<Addresses>,
    /// Rows.
    pub catalog: Catalog,
    /// Bytes.
    pub segments: Segments,
    /// A way to the journal.
    pub writer: WriterHandle,
    /// A way to the rows.
    pub replica: Handle,
}

impl Reader {
    /// The bytes at `at`, which the row of this key names. What is missing or rotten here
    /// comes from a peer, and is stored again.
    pub async fn read(&self, key: &[u8], at: Location) -> Result<Bytes, Error> {
        let error = match self.segments.read(at) {
            Ok(bytes) => return Ok(bytes),
            Err(error @ (Error::Corrupt { .. } | Error::Io { .. })) => error,
            Err(error) => return Err(error),
        };
        // It may have been moved since the row was read: then it is found by what it is.
        let row = self.catalog.raw(key)?.unwrap_or_default();
        let same = |now: &Location| now.bytes == at.bytes && now.crc == at.crc && *now != at;
        if let Some(moved) = locations(key, &row)?.into_iter().find(same)
            && let Ok(bytes) = self.segments.read(moved)
        {
            return Ok(bytes);
        }
        tracing::error!(%error, "stored bytes are damaged: asking the other replicas");
        self.mend(key, at).await?.ok_or(error)
    }

    /// Fetches bytes from whoever has them, and stores them again.
    async fn mend(&self, key: &[u8], at: Location) -> Result<Option<Bytes>, Error> {
        for (id, address) in self.addresses.all() {
            if id == self.me {
                continue;
            }
            let Ok(channel) = connect(&address) else { continue };
            let mut client = RaftTransportClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
            let request = v1::FetchRequest { cluster: self.cluster, key: key.to_vec().into() };
            let Ok(Ok(reply)) = tokio::time::timeout(PATIENCE, client.fetch(request)).await else { continue };
            let Some(bytes) = part_at(reply.into_inner().parts, at) else { continue };
            let (mut writer, row, data) = (self.writer.clone(), key.to_vec(), bytes.clone());
            let stored = tokio::task::spawn_blocking(move || store(&mut writer, row, at, data));
            self.replica.send(stored.await.map_err(|_| Error::Stopped)??);
            tracing::warn!(from = id, bytes = at.bytes, "damaged bytes were mended from a peer");
            return Ok(Some(bytes));
        }
        Ok(None)
    }
}

/// All bytes that a row names here, for a peer that has lost some; none if there is no such row.
pub fn parts(catalog: &Catalog, segments: &Segments, key: &[u8]) -> Result<Option<Vec<Bytes>>, Error> {
    let Some(value) = catalog.raw(key)? else { return Ok(None) };
    let parts: Result<_, Error> = locations(key, &value)?.into_iter().map(|at| segments.read(at)).collect();
    parts.map(Some)
}

/// Of what a peer has sent, the bytes that have lain at `at`.
pub fn part_at(parts: Vec<Bytes>, at: Location) -> Option<Bytes> {
    parts.into_iter().find(|part| part.len() == at.bytes as usize && crc32c::crc32c(part) == at.crc)
}

/// Writes bytes again that a row names; what says so to the replica.
pub fn store(sink: &mut dyn Sink, key: Vec<u8>, at: Location, bytes: Bytes) -> Result<Input, Error> {
    let places = sink.write(vec![bulk_frame(Key::group_of(&key), bytes)])?;
    let moved: BTreeMap<_, _> = places.into_iter().map(|place| ((at.segment, at.offset), place)).collect();
    Ok(Input::Mended(key, moved))
}
