//! The `mesh-agent` program: the daemon, and the command that takes away what it made.

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};
use mesh_agent::config::{AgentConfig, LogFormat};
use mesh_agent::reconcile::netlink::Netlink;
use mesh_agent::state::StateDir;
use mesh_agent::wireguard::KeyRing;
use mesh_agent::{cleanup, daemon};
use tracing_subscriber::EnvFilter;

/// Keeps this node in the mesh.
#[derive(Parser)]
#[command(name = "mesh-agent", version, args_conflicts_with_subcommands = false)]
struct Arguments {
    /// Configuration file; one that is not there means the defaults.
    #[arg(long, global = true, default_value = mesh_api::defaults::CONFIG)]
    config: PathBuf,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Run the agent (what is done without a command).
    Run,
    /// Take away everything the agent made, by its marks; nothing else is touched. The agent must not run.
    Cleanup {
        /// Also the interfaces of pods, which then have no network.
        #[arg(long)]
        pods: bool,
        /// Also the key, the IPAM journal and all other state: the next start makes a new node.
        #[arg(long)]
        purge: bool,
    },
    /// Print the version.
    Version,
}

fn main() -> ExitCode {
    mesh_agent::memory::frugal();
    let arguments = Arguments::parse();
    match start(&arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("mesh-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(arguments: &Arguments) -> Result<ExitCode> {
    if matches!(arguments.command, Some(Command::Version)) {
        println!("mesh-agent {}", env!("CARGO_PKG_VERSION"));
        return Ok(ExitCode::SUCCESS);
    }
    let config = AgentConfig::load(&arguments.config)?;
    log_to_stderr(config.log_format);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // Reading and writing kernel state is not much work: a node's cores are for its pods.
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let code = match arguments.command {
        Some(Command::Cleanup { pods, purge }) => {
            runtime.block_on(clean(&config, cleanup::Options { pods, purge }))
        }
        _ => runtime.block_on(daemon::run(config)).map(|()| ExitCode::SUCCESS),
    };
    // A blocking read of a dead datapath's socket must not hold up the end.
    runtime.shutdown_background();
    code
}

async fn clean(config: &AgentConfig, options: cleanup::Options) -> Result<ExitCode> {
    let state = StateDir::take(&config.state_dir).context("stop the agent before the clean-up")?;
    let netlink = Netlink::connect().context("rtnetlink")?;
    let reconcilers = daemon::reconcilers(&netlink, &state, KeyRing::default());
    let (operations, errors) = cleanup::cleanup(config, state, reconcilers, &netlink, options).await;
    for error in &errors {
        eprintln!("mesh-agent: cleanup: {error}");
    }
    println!("{operations} changes, {} failures", errors.len());
    Ok(if errors.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn log_to_stderr(format: LogFormat) {
    // The client's warnings are errors that we tell ourselves, by object and once.
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,kube_client=error"));
    let colours = std::io::stderr().is_terminal();
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().init(),
    }
}
