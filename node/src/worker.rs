//! The worker: takes leases, runs them, reports verdicts, shows life.

use crate::blocks::BlockCache;
use crate::index::index;
use crate::qemu;
use crate::qemu::builds::{self, QemuBuild};
use crate::qemu::task::Means;
use crate::replay::{Control, Span, lockstep, replay};
use anyhow::{Context, Result, bail, ensure};
use heddle_proto::v1::coordinator_client::CoordinatorClient;
use heddle_proto::v1::node_server::{Node, NodeServer};
use heddle_proto::verdict::TaskResult;
use heddle_proto::{CheckpointKind, RecordingId, v1};
use heddle_replay_engine::{BUILTIN, Build};
use heddle_storage::{StoreClient, channel};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

/// How long a lease request may wait at the coordinator for work.
const LEASE_WAIT: Duration = Duration::from_millis(1000);
const RETRY: Duration = Duration::from_millis(100);
/// The feature that lets this node run builds with a planted fault.
const PLANTED: &str = "+flip";

/// What a node is told at start.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// Its name.
    pub name: String,
    /// Replays at once: each slot is one vCPU role and one iothread role.
    pub slots: u32,
    /// The store's replicas.
    pub replicas: Vec<String>,
    /// The coordinator.
    pub coordinator: String,
    /// Where this node answers.
    pub address: String,
    /// Whether it offers builds with a planted fault, for tests and demos alone.
    pub offers_planted: bool,
    /// The QEMUs it offers.
    pub qemu: Vec<QemuBuild>,
}

impl NodeConfig {
    fn builds(&self) -> Vec<String> {
        let planted = self.offers_planted.then(|| format!("{BUILTIN}{PLANTED}"));
        let qemu = self.qemu.iter().map(|build| build.name.clone());
        [BUILTIN.to_string()].into_iter().chain(planted).chain(qemu).collect()
    }
}

type Running = Arc<Mutex<HashMap<String, Control>>>;

/// A node at work.
#[derive(Clone)]
pub struct Worker {
    config: Arc<NodeConfig>,
    store: StoreClient,
    blocks: BlockCache,
    coordinator: CoordinatorClient<Channel>,
    running: Running,
    instructions: Arc<AtomicU64>,
}

impl Worker {
    /// A worker; needs a tokio runtime.
    pub fn new(config: NodeConfig) -> Result<Worker> {
        let store = StoreClient::new(config.replicas.clone());
        let channel = channel::connect(&config.coordinator).context("the coordinator's address")?;
        Ok(Worker {
            blocks: BlockCache::new(store.clone()),
            store,
            coordinator: CoordinatorClient::new(channel)
                .max_decoding_message_size(channel::MESSAGE_BYTES_MAX),
            running: Arc::default(),
            instructions: Arc::default(),
            config: Arc::new(config),
        })
    }

    /// This node's service.
    pub fn service(&self) -> NodeServer<Worker> {
        NodeServer::new(self.clone())
    }

    /// Works for ever.
    pub async fn run(&self) {
        let slots = (0..self.config.slots.max(1)).map(|_| self.work());
        let mut slots: tokio::task::JoinSet<()> = slots.collect();
        slots.spawn(self.clone().show_life());
        while slots.join_next().await.is_some() {}
    }

    fn work(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut worker = self.clone();
        async move {
            loop {
                let request = v1::LeaseRequest {
                    node: worker.config.name.clone(),
                    builds: worker.config.builds(),
                    wait_ms: LEASE_WAIT.as_millis() as u64,
                };
                match worker.coordinator.lease(request).await {
                    Ok(reply) => {
                        if let Some(task) = reply.into_inner().task {
                            worker.run_task(task).await;
                        }
                    }
                    Err(_) => tokio::time::sleep(RETRY).await,
                }
            }
        }
    }

    async fn run_task(&mut self, task: v1::Task) {
        let key = format!("{}/{}/{}", task.job, task.index, task.attempt);
        let control = Control::default();
        self.running().insert(key.clone(), control.clone());
        let began = Instant::now();
        let done = self.execute(&task, control.clone()).await;
        self.running().remove(&key);
        if control.cancel.load(Ordering::Relaxed) {
            return;
        }
        let mut report = v1::ReportRequest {
            node: self.config.name.clone(),
            job: task.job.clone(),
            index: task.index,
            attempt: task.attempt,
            epoch: task.epoch,
            elapsed_us: began.elapsed().as_micros() as u64,
            ..Default::default()
        };
        match done {
            Ok(result) => {
                if let TaskResult::Replay(verdict) = &result {
                    self.instructions.fetch_add(verdict.instructions, Ordering::Relaxed);
                }
                report.verdict = serde_json::to_vec(&result).expect("a result has string keys only").into();
            }
            Err(error) => report.error = format!("{error:#}"),
        }
        // The coordinator may be away for a while: a verdict is not dropped for that.
        for _ in 0..600 {
            match self.coordinator.report(report.clone()).await {
                Err(status) if channel::is_transient(&status) => tokio::time::sleep(RETRY).await,
                _ => return,
            }
        }
    }

    fn running(&self) -> std::sync::MutexGuard<'_, HashMap<String, Control>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn execute(&self, task: &v1::Task, control: Control) -> Result<TaskResult> {
        check_roles(&task.roles)?;
        if task.build.starts_with(builds::PREFIX) {
            let (store, blocks) = (self.store.clone(), self.blocks.clone());
            let means = Means { store, blocks, builds: self.config.qemu.clone() };
            return qemu::task::run(&means, task, control).await;
        }
        let id = RecordingId::from_slice(&task.recording)?;
        let span = task.span.clone().context("the task names no span")?;
        let build = self.allowed(if task.against.is_empty() { &task.build } else { &task.against })?;
        let span = Span::fetch(&self.store, &self.blocks, id, span).await?;
        match task.kind.as_str() {
            "replay" => Ok(replay(span, build, control).await?.result),
            "lockstep" => lockstep(span, build, task.every_instruction, control).await,
            "index" => index(&self.store, span, build, task.snapshots, control).await,
            other => bail!("this node does not know tasks of kind {other:?}"),
        }
    }

    /// The build of this name, if this node's own configuration allows it.
    fn allowed(&self, name: &str) -> Result<Build> {
        let build: Build = name.parse()?;
        ensure!(build.fault.is_none() || self.config.offers_planted, "this node offers no planted builds");
        Ok(build)
    }

    async fn show_life(self) {
        let mut coordinator = self.coordinator.clone();
        loop {
            let request = v1::HeartbeatRequest {
                node: self.config.name.clone(),
                builds: self.config.builds(),
                slots: self.config.slots,
                address: self.config.address.clone(),
                running: self.running().keys().cloned().collect(),
            };
            let mut pause = RETRY;
            if let Ok(reply) = coordinator.heartbeat(request).await {
                let reply = reply.into_inner();
                for key in reply.cancelled {
                    if let Some(control) = self.running().get(&key) {
                        control.cancel.store(true, Ordering::Relaxed);
                    }
                }
                pause = Duration::from_millis((reply.lease_ms / 4).clamp(20, 5000));
            }
            tokio::time::sleep(pause).await;
        }
    }
}

/// The role plan must be the one this engine keeps: a checkpoint runs on its recorded
/// role, and these are the roles that each kind can have been recorded on.
fn check_roles(plan: &[v1::RolePlan]) -> Result<()> {
    for entry in plan {
        CheckpointKind::by_name(&entry.checkpoint).with_context(|| {
            format!("the plan names checkpoint {}, which this build does not know", entry.checkpoint)
        })?;
        ensure!(["vcpu", "iothread"].contains(&entry.role.as_str()), "the plan names role {}", entry.role);
    }
    Ok(())
}

#[tonic::async_trait]
impl Node for Worker {
    async fn status(&self, _: Request<v1::NodeStatusRequest>) -> Result<Response<v1::NodeStatus>, Status> {
        Ok(Response::new(v1::NodeStatus {
            name: self.config.name.clone(),
            builds: self.config.builds(),
            slots: self.config.slots,
            running: self.running().keys().cloned().collect(),
            instructions_replayed: self.instructions.load(Ordering::Relaxed),
        }))
    }
}
