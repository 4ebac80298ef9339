//! Many agents in one process, for `mesh-lab bench`: each follows the API server over a connection and with a token of its own,
//! by our own source up to the snapshot, and keeps its announcement said. They have no device and no kernel.
//!
//! `nodes` prints their Node objects as a list of JSON. `run` prints `ready` once every one of them knows all the others, then
//! obeys standard input, line by line: `port N PORT` has agent N announce another port, `restart BATCH` ends and
//! begins them all anew, so many at a time, and prints `ready` when all know all the others again.
#![allow(clippy::disallowed_methods, clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::io::{BufRead as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use keyservice::{Announcement, KeyClaim, PublicKey};
use mesh_agent::config::kubernetes::KubernetesConfig;
use mesh_agent::kubernetes::{announce, client};
use mesh_agent::source::decode::Kind;
use mesh_agent::source::kubernetes::{KubernetesSource, NAME};
use mesh_agent::status::Board;
use mesh_agent::store::Store;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinSet;

const PORT: u16 = 51820;
/// Who does not enforce policy does not follow pods.
const WITHOUT_PODS: [Kind; 4] = [Kind::MeshConfiguration, Kind::Node, Kind::Namespace, Kind::NetworkPolicy];

/// Many agents in one process.
#[derive(Parser)]
struct Arguments {
    /// How many
    #[arg(long, default_value_t = 999)]
    count: u32,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Print the Node objects
    Nodes,
    /// Be the agents
    Run {
        /// Directory with a kubeconfig `NAME` for each
        #[arg(long)]
        kubeconfigs: PathBuf,
        /// How many of them follow pods too
        #[arg(long, default_value_t = 0)]
        with_pods: u32,
        /// How many nodes each is to know
        #[arg(long)]
        nodes: usize,
    },
}

fn name(n: u32) -> String {
    format!("n{n:04}")
}

fn address(n: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 200, 0, 0)) + n)
}

fn announcement(n: u32, endpoint: SocketAddr) -> Announcement {
    let mut key = [7; 32];
    key[..4].copy_from_slice(&n.to_le_bytes());
    Announcement {
        name: name(n),
        keys: vec![KeyClaim { public_key: PublicKey::from_bytes(key), port: PORT, epoch: 0 }],
        endpoints: vec![endpoint],
        capabilities: BTreeSet::new(),
        pod_cidrs: Vec::new(),
        signature: None,
    }
}

fn node(n: u32) -> Value {
    let ip = address(n);
    let v4 = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 64, 0, 0)) + n * 256);
    let cidrs = [format!("{v4}/24"), format!("fd00:64:{n:x}::/64")];
    let annotations = announcement(n, SocketAddr::new(ip.into(), PORT)).to_annotations();
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name(n), "annotations": annotations, "labels": {
            "kubernetes.io/hostname": name(n), "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64",
            "topology.kubernetes.io/zone": format!("zone-{}", n % 3),
        }},
        "spec": {"podCIDR": cidrs[0], "podCIDRs": cidrs},
        "status": {"addresses": [{"type": "InternalIP", "address": ip}]},
    })
}

struct Agent {
    n: u32,
    store: Store,
    announcements: watch::Sender<Option<Announcement>>,
    tasks: JoinSet<()>,
}

impl Agent {
    async fn start(
        n: u32,
        endpoint: SocketAddr,
        kubeconfigs: &std::path::Path,
        pods: bool,
    ) -> anyhow::Result<Self> {
        let config = KubernetesConfig { kubeconfig: Some(kubeconfigs.join(name(n))) };
        let client = client::connect(&config).await.with_context(|| name(n))?;
        let store = Store::new(&[NAME]);
        store.update_local(|local| local.node_name = name(n));
        let source = KubernetesSource::new(client.clone(), &name(n), store.clone());
        let source = if pods { source } else { source.following(&WITHOUT_PODS) };
        let (announcements, announced) = watch::channel(Some(announcement(n, endpoint)));
        let mut tasks = JoinSet::new();
        tasks.spawn(source.run());
        tasks.spawn(announce::announce(client, store.clone(), announced, Board::new(&[])));
        Ok(Self { n, store, announcements, tasks })
    }

    /// Until it knows so many nodes.
    async fn knows(&self, nodes: usize) {
        let mut snapshots = self.store.watch();
        let known = snapshots.wait_for(|snapshot| snapshot.cluster.nodes.len() >= nodes);
        known.await.unwrap();
    }
}

fn say(word: &str) {
    println!("{word}");
    std::io::stdout().flush().unwrap();
}

async fn run(count: u32, kubeconfigs: PathBuf, with_pods: u32, nodes: usize) -> anyhow::Result<()> {
    let mut endpoints: Vec<SocketAddr> =
        (1..=count).map(|n| SocketAddr::new(address(n).into(), PORT)).collect();
    let mut agents: Vec<Agent> = Vec::new();
    for n in 1..=count {
        agents.push(Agent::start(n, endpoints[n as usize - 1], &kubeconfigs, n <= with_pods).await?);
        // As many at a time as a roll-out would have.
        if n % 50 == 0 || n == count {
            for agent in agents.iter().rev().take(50) {
                agent.knows(nodes).await;
            }
        }
    }
    say("ready");
    let (lines, mut orders) = tokio::sync::mpsc::channel(64);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if lines.blocking_send(line).is_err() {
                return;
            }
        }
    });
    while let Some(order) = orders.recv().await {
        match order.split_whitespace().collect::<Vec<_>>()[..] {
            ["port", n, port] => {
                let n: u32 = n.parse()?;
                let to = SocketAddr::new(address(n).into(), port.parse()?);
                endpoints[n as usize - 1] = to;
                agents[n as usize - 1].announcements.send_replace(Some(announcement(n, to)));
            }
            ["restart", batch] => {
                let batch: usize = batch.parse()?;
                for some in agents.chunks_mut(batch) {
                    for agent in some.iter_mut() {
                        agent.tasks.shutdown().await;
                        let n = agent.n;
                        let endpoint = endpoints[n as usize - 1];
                        *agent = Agent::start(n, endpoint, &kubeconfigs, n <= with_pods).await?;
                    }
                    for agent in some.iter() {
                        agent.knows(nodes).await;
                    }
                }
                say("ready");
            }
            _ => anyhow::bail!("unknown order: {order}"),
        }
    }
    Ok(())
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt().with_max_level(tracing::Level::WARN).with_writer(std::io::stderr).init();
    let count = arguments.count;
    match arguments.verb {
        Verb::Nodes => {
            let items: Vec<Value> = (1..=count).map(node).collect();
            println!("{}", json!(items));
            Ok(())
        }
        Verb::Run { kubeconfigs, with_pods, nodes } => {
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
            let result = runtime.block_on(run(count, kubeconfigs, with_pods, nodes));
            runtime.shutdown_timeout(Duration::from_secs(1));
            result
        }
    }
}
