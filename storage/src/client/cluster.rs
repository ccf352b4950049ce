//! The cluster: how its replicas stand, what they are to be, what they ask of each other.

use super::{Client, Route, StoreClient, StoreError};
use heddle_proto::{RecordingId, v1};
use std::collections::BTreeMap;
use std::time::Duration;

impl StoreClient {
    /// How each replica stands, asked one by one. Those that others know of are asked, too.
    pub async fn replicas(&self) -> Vec<v1::ReplicaRow> {
        let mut rows: Vec<v1::ReplicaRow> = vec![];
        let mut asked: Vec<String> = vec![];
        let mut to_ask = self.addresses();
        let mut others: BTreeMap<String, v1::ReplicaRow> = BTreeMap::new();
        while let Some(address) = (!to_ask.is_empty()).then(|| to_ask.remove(0)) {
            if asked.contains(&address) {
                continue;
            }
            asked.push(address.clone());
            let ask = async {
                let mut client = self.at(&address).ok()?;
                Some(client.replicas(v1::ReplicasRequest {}).await.ok()?.into_inner())
            };
            let reply = tokio::time::timeout(Duration::from_secs(1), ask).await.ok().flatten();
            let lost = v1::ReplicaRow {
                id: asked.len() as u64,
                address: address.clone(),
                role: "unreachable".into(),
                ..Default::default()
            };
            let Some(reply) = reply else {
                rows.push(lost);
                continue;
            };
            for peer in reply.peers {
                if peer.wish != "removed" {
                    to_ask.push(peer.address.clone());
                }
                others.insert(peer.address.clone(), peer);
            }
            rows.extend(reply.me);
        }
        // Who does not answer is known by those who do.
        for row in rows.iter_mut().filter(|row| row.role == "unreachable") {
            if let Some(known) = others.get(&row.address) {
                (row.id, row.wish) = (known.id, known.wish.clone());
            }
        }
        rows.sort_by_key(|row| row.id);
        rows.dedup_by_key(|row| row.id);
        rows
    }

    /// What a replica of the cluster is to be: `member`, `drained` or `removed`.
    pub async fn set_member(&self, id: u64, address: &str, wish: &str) -> Result<(), StoreError> {
        let request = v1::SetMemberRequest { id, address: address.into(), wish: wish.into() };
        let set = |mut client: Client| {
            let request = request.clone();
            async move { client.set_member(request).await }
        };
        self.call(Route::Shard(0), set).await.map(drop)
    }

    pub(crate) async fn place(&self, id: RecordingId) -> Result<u32, StoreError> {
        let place = |mut client: Client| async move {
            client.place(v1::PlaceRequest { recording: id.to_vec().into() }).await
        };
        Ok(self.call(Route::Shard(0), place).await?.shard)
    }

    pub(crate) async fn drop_owner(&self, shard: u32, id: RecordingId) -> Result<(), StoreError> {
        let drop_owner = |mut client: Client| async move {
            client.drop_owner(v1::DropOwnerRequest { shard, owner: id.to_vec().into() }).await
        };
        self.call(Route::Shard(shard), drop_owner).await.map(drop)
    }

    pub(crate) async fn forget(&self, id: RecordingId) -> Result<(), StoreError> {
        self.forget_step(id, id.into(), "recording").await?;
        self.forget_step(id, Route::Shard(0), "placement").await
    }

    pub(crate) async fn abandon(&self, id: RecordingId) -> Result<(), StoreError> {
        self.forget_step(id, id.into(), "abandon").await
    }

    async fn forget_step(&self, id: RecordingId, route: Route, step: &str) -> Result<(), StoreError> {
        let request = v1::ForgetRequest { recording: id.to_vec().into(), step: step.into() };
        let forget = |mut client: Client| {
            let request = request.clone();
            async move { client.forget(request).await }
        };
        self.call(route, forget).await.map(drop)
    }
}
