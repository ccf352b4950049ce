//! The client commands.

pub mod console;
pub mod debug;
pub mod debug_builtin;
pub mod diff;
pub mod doctor;
pub mod events;
pub mod get;
pub mod hunt;
pub mod index;
pub mod plot;
pub mod record;
pub mod record_qemu;
pub mod recordings;
pub mod replay;
pub mod replay_range;
pub mod replica;
pub mod run;
pub mod state;
pub mod transfer;

use crate::args::{Args, Bench, Command, Record, Up};
use crate::cluster::Cluster;
use crate::exit::{OK, USAGE, coded};
use crate::local::{LocalCluster, LocalConfig, TLS_DIR};
use crate::{bench, certificates, demo, output, serve};
use anyhow::{Context, Result};
use clap::CommandFactory;
use heddle_storage::tls::Credentials;
use std::collections::BTreeMap;

/// Runs the command; its exit code.
pub async fn run(args: Args) -> Result<u8> {
    let format = args.output;
    if let Some(dir) = &args.tls {
        Credentials::load(dir).map_err(|error| coded(USAGE, format!("--tls: {error}")))?.adopt();
    }
    match args.command {
        Command::Demo(command) => return demo::run(command, format).await,
        Command::Up(command) => return up(command).await,
        Command::Serve(command) => return serve::run(command).await.map(|()| OK),
        Command::Doctor(command) => return doctor::run(command, format).await,
        Command::Run(command) => return run::run(command).await,
        Command::Bench(Bench::Machine(command)) => return bench::machine::machine(command, format).await,
        Command::Bench(Bench::Qemu(command)) => return bench::qemu::qemu(command, format).await,
        Command::Bench(Bench::Store(command)) => return bench::store::store(command, format).await,
        Command::Certificate(command) => return certificates::run(&command).map(|()| OK),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Args::command(), "heddle", &mut std::io::stdout());
            return Ok(OK);
        }
        _ => {}
    }
    if let Command::Record(Record::Builtin(command)) = &args.command
        && let Some(to) = &command.dump_dtb
    {
        return record::dump_dtb(command, to);
    }
    let cluster = Cluster::open(args.cluster.as_deref()).await?;
    let done = match args.command {
        Command::Record(Record::Builtin(command)) => record::run(&cluster, *command, format).await,
        Command::Record(Record::Qemu(command)) => record_qemu::run(&cluster, *command, format).await,
        Command::Get(command) => get::run(&cluster, command, format).await,
        Command::Describe(command) => get::describe(&cluster, command, format).await,
        Command::Delete(command) => recordings::delete(&cluster.store, command).await,
        Command::Events(command) => events::run(&cluster, command, format).await,
        Command::Replay(command) => replay::run(&cluster, command, format).await,
        Command::Hunt(command) => hunt::run(&cluster, command, format).await,
        Command::Debug(command) => debug::run(&cluster, command, format).await,
        Command::State(command) => state::run(&cluster, command, format).await,
        Command::Plot(command) => plot::run(&cluster, command).await,
        Command::Index(command) => index::run(&cluster, command, format).await,
        Command::Diff(command) => diff::run(&cluster, command, format).await,
        Command::Replica(command) => replica::run(&cluster, command).await,
        Command::Scrub(command) => replica::scrub(&cluster, command, format).await,
        Command::Export(command) => transfer::export(&cluster, command).await,
        Command::Import(command) => transfer::import(&cluster, command).await,
        Command::Demo(_)
        | Command::Up(_)
        | Command::Serve(_)
        | Command::Doctor(_)
        | Command::Run(_)
        | Command::Bench(_)
        | Command::Certificate(_)
        | Command::Completions { .. } => Ok(OK),
    };
    cluster.close().await;
    done
}

/// `heddle up`: a cluster until Ctrl-C.
async fn up(command: Up) -> Result<u8> {
    let mut cluster = LocalCluster::start(LocalConfig {
        program: std::env::current_exe().context("find this program")?,
        dir: command.data.clone(),
        replicas: command.replicas,
        nodes: command.nodes,
        slots: command.slots,
        lease_ms: command.lease_ms,
        offers_planted: command.offer_planted,
        qemu: command.qemu.clone(),
        shards: command.shards,
        tls: command.mtls.then(|| command.data.join(TLS_DIR)),
        environment: BTreeMap::new(),
    })
    .await?;
    println!("{}", serde_json::to_string_pretty(&cluster.file())?);
    output::say(format_args!("the cluster is up: heddle --cluster {} ...", command.data.display()));
    loop {
        tokio::select! {
            () = serve::asked_to_stop() => break,
            () = tokio::time::sleep(std::time::Duration::from_millis(500)) => {
                if let Some((name, why)) = cluster.ended() {
                    output::say(format_args!("heddle: {why}\nheddle: {name} is started again"));
                    cluster.start_part(&name)?;
                }
            }
        }
    }
    cluster.stop().await;
    Ok(OK)
}
