//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};

const EXIT_CODES: &str = "Exit codes:
  0  the answer is printed; with --check, the mesh is healthy
  1  with --check: a peer is down, a device is not up, a reconciler fails or there is an issue; else a failure
  2  the command line is wrong
  3  the agent is not there or does not answer
  4  permission to its socket is refused
  5  the agent answered with an error";

/// Asks mesh-agent on this node about the mesh.
#[derive(Debug, Parser)]
#[command(name = "meshctl", version, about, after_help = EXIT_CODES)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, ClapArgs)]
pub(crate) struct Global {
    /// The agent's socket [default: /run/margay/control.sock for root, else status.sock]
    #[arg(long, global = true, env = "MARGAY_SOCKET", value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,
    /// Tables for people, JSON or YAML for programs
    #[arg(short, long, global = true, value_enum, default_value = "table")]
    pub(crate) output: Format,
    /// Print again every second, or every SECONDS, until interrupted
    #[arg(short, long, global = true, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1",
          value_parser = parse_interval)]
    pub(crate) watch: Option<Duration>,
    /// Seconds to wait for an answer
    #[arg(long, global = true, value_name = "SECONDS", default_value = "10", value_parser = parse_interval)]
    pub(crate) timeout: Duration,
}

fn parse_interval(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.05..=86_400.0).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("not a number of seconds from 0.05 to 86400".to_owned()),
    }
}

/// How to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Table,
    Json,
    Yaml,
}

/// What to ask.
#[derive(Debug, Clone, Subcommand)]
pub(crate) enum Command {
    /// This node: devices, key, peers, what is enforced, what is wrong
    Status {
        /// Exit with 1 when something is wrong
        #[arg(long)]
        check: bool,
    },
    /// Every peer: endpoint, allowed IPs, handshake age, traffic, MTU, state
    Peers {
        /// Also public keys, devices, packets, all allowed IPs, offloads, and what was dropped and why
        #[arg(short, long)]
        verbose: bool,
        /// Only these nodes
        names: Vec<String>,
    },
    /// Network policies
    #[command(subcommand)]
    Policy(Policy),
    /// This node's keys: epochs, devices, how far their rotation is, whom it waits for and why
    Keys {
        #[command(subcommand)]
        command: Option<Keys>,
    },
    /// Whose announcements are believed
    #[command(subcommand)]
    Nodes(Nodes),
    /// Packets that policy dropped, newest last
    Events {
        /// Go on printing new ones
        #[arg(short, long)]
        follow: bool,
    },
    /// The agent's snapshot and desired state, for a bug report; it holds no secret
    Dump,
    /// Read every source again and wait until the result is enforced
    Sync,
    /// Put Margay into the cluster that kubectl knows; needs no agent
    Install(crate::install::Install),
}

/// `meshctl keys …`
#[derive(Debug, Clone, Subcommand)]
pub(crate) enum Keys {
    /// What is printed without a command
    Show,
    /// Give this node a new key; nothing is lost, and the others follow
    Rotate {
        /// Ask all nodes, by raising spec.rotationEpoch in the manifest of the MeshConfiguration
        #[arg(long)]
        all: bool,
    },
}

/// `meshctl nodes …`
#[derive(Debug, Clone, Subcommand)]
pub(crate) enum Nodes {
    /// Believe the key that a node's announcement is signed with now (announcementTrust: first-use), on this node
    Trust {
        /// The node
        name: String,
    },
}

/// `meshctl policy …`
#[derive(Debug, Clone, Subcommand)]
pub(crate) enum Policy {
    /// The policies and the local pods each selects
    List,
}
