//! The coordinator's service: state in the store, written before it is answered.

use crate::hunt;
use crate::job::{Job, JobKind, JobState, Task, TaskState, Work};
use crate::plan;
use crate::recorders::{self, Recorders};
use crate::scheduler::Scheduler;
use anyhow::{Context, Result};
use heddle_proto::manifest::Manifest;
use heddle_proto::qemu::EVENT_COST;
use heddle_proto::v1::coordinator_server::{Coordinator as Service, CoordinatorServer};
use heddle_proto::verdict::SideB;
use heddle_proto::{RecordingId, v1};
use heddle_storage::{StoreClient, StoreError};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{Mutex, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

/// Longest wait of a lease request for work.
const LEASE_WAIT_MS_MAX: u64 = 5000;
/// Longest description of a hunt's other side.
const SIDE_B_BYTES_MAX: usize = 64 << 10;
/// Most spans of a job.
const SPANS_MAX: usize = 1024;

/// What a coordinator is told at start.
#[derive(Clone, Debug)]
pub struct CoordinatorConfig {
    /// Its name, for people.
    pub name: String,
    /// The store's replicas.
    pub replicas: Vec<String>,
    /// A lease without a sign of life lasts so long; so does a silent recorder.
    pub lease_ms: u64,
}

struct State {
    scheduler: Scheduler,
    recorders: Recorders,
}

/// A running coordinator.
#[derive(Clone)]
pub struct Coordinator {
    store: StoreClient,
    epoch: u64,
    lease_ms: u64,
    started: tokio::time::Instant,
    state: Arc<Mutex<State>>,
    /// Counts changes, to wake who waits for one.
    version: Arc<watch::Sender<u64>>,
    /// Why this coordinator has to stop, once it has.
    stopping: Arc<watch::Sender<Option<String>>>,
}

fn now_unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}

impl Coordinator {
    /// Takes over: a new epoch, and all jobs from the store.
    pub async fn start(config: CoordinatorConfig) -> Result<Coordinator> {
        let store = StoreClient::new(config.replicas).with_patience(Duration::from_secs(60));
        let epoch = store.meta_acquire(&config.name).await.context("take over as coordinator")?;
        let mut scheduler = Scheduler::new(config.lease_ms);
        for row in store.meta_scan("job/").await.context("read the jobs")? {
            let job: Job = serde_json::from_slice(&row.value).with_context(|| format!("read {}", row.key))?;
            scheduler.jobs.insert(job.id.clone(), job);
        }
        let state = State { scheduler, recorders: Recorders::default() };
        let coordinator = Coordinator {
            store,
            epoch,
            lease_ms: config.lease_ms,
            started: tokio::time::Instant::now(),
            state: Arc::new(Mutex::new(state)),
            version: Arc::new(watch::channel(0).0),
            stopping: Arc::new(watch::channel(None).0),
        };
        tokio::spawn(coordinator.clone().expire_leases());
        tokio::spawn(coordinator.clone().cut_silent_recorders());
        Ok(coordinator)
    }

    /// This coordinator's service.
    pub fn service(&self) -> CoordinatorServer<Coordinator> {
        CoordinatorServer::new(self.clone())
    }

    /// Ends when another coordinator has taken over, with the reason.
    pub async fn stopped(&self) -> String {
        let mut stopping = self.stopping.subscribe();
        match stopping.wait_for(Option::is_some).await {
            Ok(why) => why.clone().unwrap_or_default(),
            Err(_) => String::new(),
        }
    }

    /// Writes what has changed; nothing is answered before that.
    async fn persist(&self, state: &mut State) -> Result<(), Status> {
        let changed = state.scheduler.take_changed();
        if changed.is_empty() {
            return Ok(());
        }
        for job in &changed {
            let value = serde_json::to_vec(job).expect("a job has string keys only").into();
            let row = v1::MetaRow { key: format!("job/{}", job.id), value };
            if let Err(error) = self.store.meta_write(self.epoch, vec![row], vec![]).await {
                // What was not written is not true: the next coordinator reads the rows.
                let why = match &error {
                    StoreError::Fenced(_) => "another coordinator has taken over".to_string(),
                    other => format!("jobs can't be written: {other}"),
                };
                self.stopping.send_replace(Some(why));
                return Err(Status::unavailable(error.to_string()));
            }
        }
        self.version.send_modify(|version| *version += 1);
        Ok(())
    }

    /// Changes the state and writes it. In a task of its own: a caller that goes away
    /// in the middle must not leave a change that nobody writes.
    async fn change<T: Send + 'static>(
        &self,
        change: impl FnOnce(&mut Scheduler) -> T + Send + 'static,
    ) -> Result<T, Status> {
        let coordinator = self.clone();
        let task = tokio::spawn(async move {
            let mut state = coordinator.state.lock().await;
            let value = change(&mut state.scheduler);
            coordinator.persist(&mut state).await.map(|()| value)
        });
        task.await.unwrap_or_else(|_| Err(Status::internal("the change panicked")))
    }

    async fn expire_leases(self) {
        let mut interval = tokio::time::interval(Duration::from_millis((self.lease_ms / 8).max(20)));
        loop {
            interval.tick().await;
            let mut state = self.state.lock().await;
            state.scheduler.expire(now_unix_ms());
            if self.persist(&mut state).await.is_err() {
                return;
            }
        }
    }

    async fn cut_silent_recorders(self) {
        let token: [u8; 16] = rand::random();
        let mut interval = tokio::time::interval(Duration::from_millis((self.lease_ms / 2).max(100)));
        loop {
            interval.tick().await;
            let Ok(rows) = self.store.list().await else { continue };
            let open: Vec<RecordingId> = rows
                .iter()
                .filter(|row| row.state == "recording")
                .filter_map(|row| RecordingId::from_slice(&row.recording).ok())
                .collect();
            let silent = {
                let mut state = self.state.lock().await;
                state.recorders.poll_silent(&open, now_unix_ms(), self.lease_ms)
            };
            for id in silent {
                match recorders::cut(&self.store, id, &token).await {
                    Ok(epoch) => {
                        tracing::warn!(recording = %id, "its recorder is silent: sealed at the durable prefix");
                        self.state.lock().await.recorders.fence(id, epoch);
                    }
                    Err(error) => tracing::warn!(recording = %id, %error, "can't cut the recording"),
                }
            }
        }
    }

    async fn plan(&self, request: v1::SubmitRequest) -> Result<Job, Status> {
        let id = RecordingId::from_slice(&request.recording)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let row = self.store.get(id).await.map_err(|error| match error {
            StoreError::NotFound(what) => Status::not_found(what),
            other => Status::unavailable(other.to_string()),
        })?;
        if row.state == "recording" {
            return Err(Status::failed_precondition("the recording has not ended yet"));
        }
        if row.committed_events == 0 {
            return Err(Status::failed_precondition(
                "the recording has no events: nothing of it was committed",
            ));
        }
        let manifest = Manifest::decode(&row.manifest).map_err(|e| Status::data_loss(e.to_string()))?;
        if request.side_b.len() > SIDE_B_BYTES_MAX {
            return Err(Status::invalid_argument("the other side's description is too long"));
        }
        if request.kind != "hunt" && !request.side_b.is_empty() {
            return Err(Status::invalid_argument("only a hunt has another side"));
        }
        if request.kind == "index" && !request.against.is_empty() {
            return Err(Status::invalid_argument("an index is made by the recorded build"));
        }
        let (kind, spans) = match request.kind.as_str() {
            "replay" => (JobKind::Replay, request.spans.max(1) as usize),
            // Every snapshot is a border: the more spans, the nearer the first bad one begins.
            // What is put in at power-on is in no snapshot of the recording's.
            "hunt" if puts_in_files(&request.side_b)? => (JobKind::Hunt, 1),
            "hunt" => (JobKind::Hunt, row.snapshots.len() + 1),
            "index" => (JobKind::Index, 1),
            other => return Err(Status::invalid_argument(format!("no jobs of kind {other:?}"))),
        };
        let event_cost = if manifest.qemu().is_some() { EVENT_COST } else { 0 };
        let spans = plan::spans(&row, spans.min(SPANS_MAX), event_cost);
        let tasks = match kind {
            JobKind::Replay => {
                spans.into_iter().map(|span| Task::new(Work::Replay, hunt::SPANS, span)).collect()
            }
            JobKind::Hunt => hunt::tasks(spans),
            JobKind::Index => spans.into_iter().map(|span| Task::new(Work::Index, "index", span)).collect(),
        };
        let against = if request.against.is_empty() { manifest.build.clone() } else { request.against };
        Ok(Job {
            id: request.id,
            kind,
            recording: id,
            build: manifest.build,
            against,
            side_b: request.side_b.to_vec(),
            snapshots: request.snapshots.min(SPANS_MAX as u32),
            state: JobState::Running,
            phase: hunt::SPANS.into(),
            tasks,
            outcome: String::new(),
            result: serde_json::Value::Null,
            created_unix_ms: now_unix_ms(),
            ended_unix_ms: 0,
        })
    }
}

/// Whether the other side of a hunt has other files or disks.
fn puts_in_files(side_b: &[u8]) -> Result<bool, Status> {
    if side_b.is_empty() {
        return Ok(false);
    }
    let side: SideB = serde_json::from_slice(side_b)
        .map_err(|error| Status::invalid_argument(format!("the hunt's other side: {error}")))?;
    Ok(!side.files.is_empty() || !side.disks.is_empty())
}

fn job_row(job: &Job) -> v1::JobRow {
    v1::JobRow {
        id: job.id.clone(),
        kind: name_of(&job.kind),
        recording: job.recording.to_vec().into(),
        state: name_of(&job.state),
        against: job.against.clone(),
        tasks: job.tasks.iter().enumerate().map(|(index, task)| task_row(index, task)).collect(),
        outcome: job.outcome.clone(),
        result: serde_json::to_vec(&job.result).unwrap_or_default().into(),
        created_unix_ms: job.created_unix_ms,
        ended_unix_ms: job.ended_unix_ms,
        phase: job.phase.clone(),
    }
}

fn task_row(index: usize, task: &Task) -> v1::TaskRow {
    v1::TaskRow {
        index: index as u32,
        state: match task.state {
            TaskState::Waiting => "waiting",
            TaskState::Leased { .. } => "leased",
            TaskState::Done if task.is_disputed => "disputed",
            TaskState::Done => "done",
            TaskState::Dropped => "dropped",
        }
        .into(),
        from_icount: task.span.from_icount,
        to_icount: task.span.from_icount + task.span.instructions,
        node: task.node.clone(),
        attempt: task.attempt,
        verdict: task.result.as_ref().and_then(|r| serde_json::to_vec(r).ok()).unwrap_or_default().into(),
        elapsed_us: task.elapsed_us,
        what: task.phase.clone(),
    }
}

/// The lower-case name that serde gives a plain enum's value.
fn name_of(value: &impl serde::Serialize) -> String {
    let value = serde_json::to_value(value).unwrap_or_default();
    value.as_str().unwrap_or_default().to_string()
}

#[tonic::async_trait]
impl Service for Coordinator {
    type WatchStream = ReceiverStream<Result<v1::JobRow, Status>>;

    async fn submit(&self, request: Request<v1::SubmitRequest>) -> Result<Response<v1::SubmitReply>, Status> {
        let request = request.into_inner();
        let id = request.id.clone();
        if id.is_empty() || id.len() > 64 || !id.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') {
            return Err(Status::invalid_argument("a job's id is 1 to 64 letters, digits and dashes"));
        }
        if self.state.lock().await.scheduler.jobs.contains_key(&id) {
            return Ok(Response::new(v1::SubmitReply { id }));
        }
        let job = self.plan(request).await?;
        let (build, against) = (job.build.clone(), job.against.clone());
        let is_young = self.started.elapsed() < Duration::from_millis(self.lease_ms);
        let is_offered = self
            .change(move |scheduler| {
                let is_offered = scheduler.is_offered(&build) && scheduler.is_offered(&against);
                if is_offered {
                    scheduler.submit(job);
                }
                is_offered.then_some(()).ok_or(against)
            })
            .await?;
        if let Err(against) = is_offered {
            // A coordinator that has just taken over has not heard of all nodes yet.
            if is_young {
                return Err(Status::unavailable("no node that offers the build has been heard yet"));
            }
            return Err(Status::unimplemented(format!(
                "no node offers build {against}; `heddle get nodes -o wide` shows what they offer"
            )));
        }
        Ok(Response::new(v1::SubmitReply { id }))
    }

    async fn jobs(&self, request: Request<v1::JobsRequest>) -> Result<Response<v1::JobsReply>, Status> {
        let id = request.into_inner().id;
        let state = self.state.lock().await;
        let jobs = state.scheduler.jobs.values().filter(|job| id.is_empty() || job.id == id);
        Ok(Response::new(v1::JobsReply { jobs: jobs.map(job_row).collect() }))
    }

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let id = request.into_inner().id;
        let (sender, rows) = tokio::sync::mpsc::channel(4);
        let coordinator = self.clone();
        tokio::spawn(async move {
            let mut version = coordinator.version.subscribe();
            loop {
                version.mark_unchanged();
                let row = coordinator.state.lock().await.scheduler.jobs.get(&id).map(job_row);
                let row = row.ok_or_else(|| Status::not_found(format!("no job {id}")));
                let is_last = row.as_ref().map_or(true, |row| row.state != "running");
                if sender.send(row).await.is_err() || is_last || version.changed().await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(rows)))
    }

    async fn heartbeat(
        &self,
        request: Request<v1::HeartbeatRequest>,
    ) -> Result<Response<v1::HeartbeatReply>, Status> {
        let mut state = self.state.lock().await;
        let cancelled = state.scheduler.handle_heartbeat(&request.into_inner(), now_unix_ms());
        Ok(Response::new(v1::HeartbeatReply { epoch: self.epoch, lease_ms: self.lease_ms, cancelled }))
    }

    async fn lease(&self, request: Request<v1::LeaseRequest>) -> Result<Response<v1::LeaseReply>, Status> {
        let request = request.into_inner();
        let wait = Duration::from_millis(request.wait_ms.min(LEASE_WAIT_MS_MAX));
        let until = tokio::time::Instant::now() + wait;
        let mut version = self.version.subscribe();
        loop {
            version.mark_unchanged();
            let (request, epoch) = (request.clone(), self.epoch);
            let lease = move |scheduler: &mut Scheduler| {
                scheduler.lease(&request.node, &request.builds, epoch, now_unix_ms())
            };
            if let Some(task) = self.change(lease).await? {
                return Ok(Response::new(v1::LeaseReply { task: Some(task) }));
            }
            match tokio::time::timeout_at(until, version.changed()).await {
                Ok(Ok(())) => {}
                _ => return Ok(Response::new(v1::LeaseReply { task: None })),
            }
        }
    }

    async fn report(&self, request: Request<v1::ReportRequest>) -> Result<Response<v1::ReportReply>, Status> {
        let request = request.into_inner();
        let counted = self.change(move |scheduler| scheduler.handle_report(&request, now_unix_ms())).await?;
        Ok(Response::new(v1::ReportReply { counted }))
    }

    async fn nodes(&self, _: Request<v1::NodesRequest>) -> Result<Response<v1::NodesReply>, Status> {
        let state = self.state.lock().await;
        let now = now_unix_ms();
        let busy = |name: &str| {
            let tasks = state.scheduler.jobs.values().flat_map(|job| &job.tasks);
            tasks.filter(|t| matches!(&t.state, TaskState::Leased { node, .. } if node == name)).count()
                as u32
        };
        let mut nodes: Vec<v1::NodeRow> = state
            .scheduler
            .nodes
            .iter()
            .map(|(name, node)| v1::NodeRow {
                name: name.clone(),
                state: if node.is_quarantined {
                    "quarantined"
                } else if now < node.heard_unix_ms + self.lease_ms {
                    "ready"
                } else {
                    "lost"
                }
                .into(),
                builds: node.builds.clone(),
                slots: node.slots,
                busy: busy(name),
                done: node.done,
                address: node.address.clone(),
            })
            .collect();
        nodes.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Response::new(v1::NodesReply { nodes }))
    }

    async fn recording(
        &self,
        request: Request<v1::RecordingRequest>,
    ) -> Result<Response<v1::RecordingReply>, Status> {
        let r = request.into_inner();
        let id =
            RecordingId::from_slice(&r.recording).map_err(|e| Status::invalid_argument(e.to_string()))?;
        let fenced = self.state.lock().await.recorders.handle_sign(id, r.epoch, now_unix_ms());
        Ok(Response::new(v1::RecordingReply { fenced }))
    }

    async fn info(&self, _: Request<v1::InfoRequest>) -> Result<Response<v1::InfoReply>, Status> {
        let replicas = self.store.addresses();
        Ok(Response::new(v1::InfoReply { replicas, epoch: self.epoch }))
    }
}
