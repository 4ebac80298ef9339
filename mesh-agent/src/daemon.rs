//! The one place where everything is tied together: config → key → sources → store → plan → runner →
//! status, CNI and the sockets.
//!
//! ```text
//!   a source of     ┐                                    ┌ reconcilers ┐
//!   CNI server      ├▶ Store ─▶ Planner ─▶ Desired ─▶ Runner           ├▶ Board ─▶ API, metrics
//!   Observer        │             │                      ├ Observer    │
//!   Rotator         ┘             │                      └ Rotator     ┘
//!                                 └▶ incumbents.json, announcement
//! ```

use std::collections::BTreeSet;
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use keyservice::admission::IncumbentsProblem;
use keyservice::rotation::KeyStore;
use keyservice::{Announcement, Incumbents, SigningKey, keyfile};
use mesh_api::defaults;
use mesh_api::status::Issue;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::api::{self, Api, Keys};
use crate::cni;
use crate::config::{AgentConfig, DatapathChoice};
use crate::desired::Datapath;
use crate::kubernetes::{announce, client, condition, events as cluster_events, node_status};
use crate::metrics::Metrics;
use crate::observe::{self, Observer};
use crate::planner::{self, Planner};
use crate::reconcile::netlink::Netlink;
use crate::reconcile::policy::events::{self, DenyLog};
use crate::reconcile::policy::{Engine, PolicyReconciler};
use crate::reconcile::{
    Reconciler, Stage, addresses::AddressReconciler, links::LeftoverReconciler, links::LinkReconciler,
    masquerade::MasqueradeReconciler, neighbours::NeighbourReconciler, routes::RouteReconciler,
    rules::RuleReconciler, sysctls::SysctlReconciler, wireguard::WireguardReconciler,
};
use crate::rotate::{self, Rotator, SecretFile};
use crate::runner::Runner;
use crate::source::directory::DirectorySource;
use crate::source::kubernetes::KubernetesSource;
use crate::state::StateDir;
use crate::status::Board;
use crate::store::Store;
use crate::wireguard::{Kernel, KeyRing, Live, NodeDatapaths};
use crate::{kernel_events, learned, notify, source};

/// Name of what the node knows of itself, as a source.
const LOCAL: &str = "local";
/// Name of the manifest directory, as a source.
const DIRECTORY: &str = "directory";
/// For CNI requests under way when the agent is told to stop.
const FINISH_WITHIN: Duration = Duration::from_secs(10);

/// The reconcilers of the kernel's and the datapath's state; policy's comes beside them.
pub fn reconcilers(netlink: &Netlink, state: &StateDir, keys: KeyRing) -> Vec<Box<dyn Reconciler>> {
    let datapaths = Box::new(NodeDatapaths::new(netlink.clone()));
    let live = Live::default();
    vec![
        Box::new(SysctlReconciler::new(crate::proc_sys::root(), state.sysctls())),
        Box::new(LinkReconciler::new(netlink.clone()).with_live(live.clone())),
        Box::new(AddressReconciler::new(netlink.clone())),
        Box::new(NeighbourReconciler::new(netlink.clone())),
        Box::new(WireguardReconciler::new(datapaths, keys).with_live(live)),
        Box::new(RouteReconciler::new(netlink.clone())),
        Box::new(RuleReconciler::new(netlink.clone())),
        Box::new(MasqueradeReconciler::new()),
        Box::new(LeftoverReconciler::new(netlink.clone())),
    ]
}

/// Runs until SIGTERM or SIGINT. Everything the agent made stays in place: the next one takes it over.
pub async fn run(config: AgentConfig) -> Result<()> {
    let stop = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let state = StateDir::take(&config.state_dir)?;
    let files = KeyStore::new(state.root());
    let keys = files.load()?;
    let (incumbents, forgotten) = remembered(&state.incumbents())?;
    info!(
        node = config.node_name,
        public_keys = ?keys.state.slots.iter().map(|slot| slot.public_key).collect::<Vec<_>>(),
        objects = config.kubernetes.as_ref().map_or(config.manifests.display().to_string(), |_| "API server".to_owned()),
        state = %config.state_dir.display(),
        version = env!("CARGO_PKG_VERSION"),
        "mesh-agent starts"
    );

    api::prepare_run_dir(&config.run_dir)?;
    let client = match &config.kubernetes {
        Some(kubernetes) => Some(client::connect(kubernetes).await?),
        None => None,
    };
    let objects = if client.is_some() { source::kubernetes::NAME } else { DIRECTORY };
    let store = Store::new(&[objects, LOCAL, cni::SOURCE]);
    // A socket for each of those that dump at the same time: one socket has one dump.
    let connect = || Netlink::connect().context("rtnetlink");
    let netlink = connect()?;
    let devices = observe::present(&netlink.links().await?);
    tell_of_self(&store, &config, incumbents, devices);
    let datapath = choose_datapath(config.datapath);
    store.update_local(|local| local.datapath = datapath);
    remember_endpoints(&store, &state.learned());
    let ring = KeyRing::default();
    let mut reconcilers = reconcilers(&netlink, &state, ring.clone());
    let mut rows: Vec<_> = reconcilers.iter().map(|one| (one.stage(), one.name())).collect();
    rows.push((Stage::Policy, "policy"));
    rows.sort();
    let board = Board::new(&rows.iter().map(|(_, name)| *name).collect::<Vec<_>>());
    board.set_issues("memory", forgotten.into_iter().collect());
    let engine = Engine::open(Path::new(defaults::BPF_DIR));
    reconcilers.push(Box::new(PolicyReconciler::new(engine.clone(), board.clone(), netlink.clone())));
    let cni_server =
        cni::Server::open(state.root(), store.clone(), board.clone(), engine.clone(), connect()?).await;
    let denied = DenyLog::default();

    let (plans, to_runner) = watch::channel(Arc::default());
    let (announcements, to_announcer) = watch::channel(None);
    let (claims, to_rotator) = watch::channel(Arc::default());
    let parts = rotate::Parts {
        files,
        ring,
        store: store.clone(),
        board: board.clone(),
        claims: to_rotator,
        secret: SecretFile::new(config.preshared_key_file.clone()),
    };
    let rotator = Rotator::new(keys, parts);
    store.source_synced(LOCAL, 1);
    let (orders, to_obey) = mpsc::channel(16);
    let wake = Arc::new(Notify::new());
    let observer = Observer::new(
        connect()?,
        Box::new(NodeDatapaths::new(netlink.clone())),
        board.clone(),
        store.clone(),
        state.learned(),
    );
    let secret = keyfile::load_or_create(&state.announcement_key(), &mut rand::rng())?;
    let signing_key = SigningKey::derive(&secret).context("announcement key")?;
    let planner = Planner {
        store: store.clone(),
        board: board.clone(),
        plans,
        announcements,
        claims,
        incumbents: state.incumbents(),
        signing_key,
    };
    let runner = Runner::new(reconcilers, board.clone());
    let cni_socket = cni::serve::bind(&config.run_dir.join(defaults::CNI_SOCKET), 0o600)?;
    let metrics = Arc::new(Metrics { engine: Some(engine.clone()), cni: Some(cni_server.clone()) });
    let manifests = client.is_none().then(|| config.manifests.clone());
    let keys = Some(Arc::new(Keys::new(orders, manifests)));
    let api = Api { board: board.clone(), store: store.clone(), denied: denied.clone(), metrics, keys };

    let mut tasks = Tasks::default();
    tasks.spawn("kernel event listener", kernel_events::follow(wake.clone()).context("rtnetlink events")?);
    match client {
        Some(client) => talk_to_cluster(&mut tasks, client, &config, &store, &board, to_announcer),
        None => {
            let source = DirectorySource::new(&config.manifests, &config.node_name, store.clone())
                .with_context(|| format!("cannot watch {}", config.manifests.display()))?;
            tasks.spawn("directory source", source.run());
            let announcer = planner::announce(config.manifests.clone(), to_announcer, board.clone());
            tasks.spawn("announcer", announcer);
        }
    }
    tasks.spawn("observer", observer.run(wake.clone()));
    tasks.spawn("planner", planner.run());
    tasks.spawn("rotator", rotator.run(to_obey));
    tasks.spawn("runner", runner.run(to_runner, wake));
    tasks.spawn("CNI server", cni::serve::serve(cni_server, cni_socket, stop.clone()));
    tasks.spawn("API server", serve_api(api, config.clone(), stop.clone()));
    // Without deny events everything else still works: its end is not the daemon's.
    tokio::spawn(events::follow(engine, denied, stop.clone()));
    tokio::spawn(tell_readiness(board));

    let ended = tokio::select! {
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        name = tasks.first_to_end() => Some(name),
    };
    let _ = notify::notify("STOPPING=1");
    stop.cancel();
    // A pod half made is finished first.
    if tokio::time::timeout(FINISH_WITHIN, tasks.end_of("CNI server")).await.is_err() {
        warn!("a CNI request was not finished in time");
    }
    match ended {
        None => {
            info!("mesh-agent stops; everything it made stays in place");
            Ok(())
        }
        // None of them ends by itself. systemd starts anew, and what is in place stays until then.
        Some(name) => bail!("the {name} ended unexpectedly"),
    }
}

/// The API server in place of a directory: what it says, and what it is told.
fn talk_to_cluster(
    tasks: &mut Tasks,
    client: kube::Client,
    config: &AgentConfig,
    store: &Store,
    board: &Board,
    announcements: watch::Receiver<Option<Announcement>>,
) {
    let source = KubernetesSource::new(client.clone(), &config.node_name, store.clone());
    tasks.spawn("Kubernetes source", source.run());
    let announcer = announce::announce(client.clone(), store.clone(), announcements, board.clone());
    tasks.spawn("announcer", announcer);
    tasks.spawn("teller of the condition", condition::tell(client.clone(), board.clone()));
    tasks.spawn("teller of the node's status", node_status::tell(client.clone(), board.clone()));
    tasks.spawn("teller of events", cluster_events::tell(client, board.clone()));
}

/// Whom this node admitted before. A damaged file has been put aside: going on without it beats being down, and
/// the issue stays until the next start, since a newcomer may meanwhile have been admitted in an incumbent's place.
fn remembered(path: &Path) -> Result<(Incumbents, Option<Issue>)> {
    let error = match Incumbents::load(path) {
        Ok(incumbents) => return Ok((incumbents, None)),
        Err(error) if error.aside.is_some() => error,
        Err(error) => return Err(error.into()),
    };
    warn!("{error}");
    let field = match &error.problem {
        IncumbentsProblem::Content { field, .. } => field.clone(),
        IncumbentsProblem::File(_) => String::new(),
    };
    let issue = Issue {
        object: format!("file {}", path.display()),
        field,
        reason: "MemoryLost".to_owned(),
        message: format!("{error}: whom this node had admitted before is forgotten"),
    };
    Ok((Incumbents::default(), Some(issue)))
}

fn tell_of_self(store: &Store, config: &AgentConfig, incumbents: Incumbents, devices: BTreeSet<String>) {
    store.update_local(|local| {
        local.node_name = config.node_name.clone();
        local.incumbents = incumbents;
        local.pod_cidrs = config.pod_cidrs.clone();
        local.endpoints = config.endpoints.clone();
        local.devices = devices;
    });
}

/// The kernel's WireGuard, where it is to be found or asked for.
fn choose_datapath(choice: DatapathChoice) -> Datapath {
    let chosen = match choice {
        DatapathChoice::Userspace => Datapath::Userspace,
        // If it has none, that is an error of the links, which says so.
        DatapathChoice::Kernel => Datapath::Kernel,
        DatapathChoice::Auto => match Kernel::new().has_wireguard() {
            Ok(true) => Datapath::Kernel,
            Ok(false) => Datapath::Userspace,
            Err(error) => {
                warn!("whether the kernel has WireGuard cannot be told, so userspace it is: {error}");
                Datapath::Userspace
            }
        },
    };
    info!(datapath = ?chosen, choice = ?choice, "who carries packets");
    chosen
}

/// Where peers were last heard is a hint: without it, or with a damaged one, the agent starts all the same.
fn remember_endpoints(store: &Store, path: &Path) {
    match learned::load(path) {
        Ok(learned) => drop(store.update_local(|local| local.learned_endpoints = learned)),
        Err(error) => warn!("{error}"),
    }
}

/// Tells systemd once every reconciler has seen a plan made of everything the sources have.
async fn tell_readiness(board: Board) {
    let mut observed = board.subscribe();
    let ready = observed
        .wait_for(|seen| seen.snapshot.synced && seen.reconcilers.iter().all(|row| row.state != "pending"));
    if ready.await.is_ok()
        && let Err(error) = notify::notify("READY=1")
    {
        warn!("cannot notify systemd: {error}");
    }
}

async fn serve_api(api: Api, config: AgentConfig, stop: CancellationToken) {
    if let Err(problem) = api::serve(api, &config.run_dir, &config.metrics_address.to_string(), stop).await {
        error!("API: {problem}");
    }
}

/// Tasks that run as long as the daemon does, by name.
#[derive(Default)]
struct Tasks(JoinSet<&'static str>);

impl Tasks {
    fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.0.spawn(async move {
            // A panic in it must end the daemon by name, not vanish with the task.
            match tokio::spawn(task).await {
                Ok(()) => name,
                Err(error) => {
                    warn!("{name}: {error}");
                    name
                }
            }
        });
    }

    /// Waits for the task of this name to end.
    async fn end_of(&mut self, wanted: &str) {
        while let Some(ended) = self.0.join_next().await {
            if ended.is_ok_and(|name| name == wanted) {
                return;
            }
        }
    }

    async fn first_to_end(&mut self) -> &'static str {
        match self.0.join_next().await {
            Some(Ok(name)) => name,
            _ => "task",
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_damaged_memory_is_put_aside_and_told_and_does_not_end_the_start() {
        let state = tempfile::tempdir().unwrap();
        let path = state.path().join("incumbents.json");
        assert_eq!(remembered(&path).unwrap(), (Incumbents::default(), None));
        Incumbents::default().store(&path).unwrap();
        std::fs::write(&path, "{\"version\": 1, \"nodes\": {\"a\": 7}}").unwrap();
        let (incumbents, issue) = remembered(&path).unwrap();
        let issue = issue.unwrap();
        assert_eq!((incumbents, issue.field.as_str()), (Incumbents::default(), "nodes.a"));
        assert!(issue.message.contains("incumbents.json.corrupt"), "{}", issue.message);
        assert!(!path.exists() && state.path().join("incumbents.json.corrupt").exists());
    }
}
