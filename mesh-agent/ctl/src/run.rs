//! One invocation: ask, print, and say by the exit code how it went.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mesh_api::defaults;
use mesh_api::status::{
    DenyEvent, Ordered, PeerState, PeerStatus, PolicyStatus, RotationStatus, Status, Synced, Trusted,
};

use crate::args::{Args, Command, Format, Global, Keys, Nodes, Policy};
use crate::client::{Client, ClientError};
use crate::{output, render};

/// `--check` found something wrong.
pub(crate) const EXIT_TROUBLE: u8 = 1;
const EXIT_NOT_THERE: u8 = 3;
const EXIT_PERMISSION: u8 = 4;
const EXIT_ANSWER: u8 = 5;

/// Between two looks at what is enforced.
const POLL: Duration = Duration::from_millis(50);

pub(crate) async fn run(args: Args) -> u8 {
    let socket = args.global.socket.clone().unwrap_or_else(default_socket);
    let client = Client::new(&socket, args.global.timeout);
    loop {
        let code = match once(&client, &args.global, &args.command).await {
            Ok(code) => code,
            Err(error) => {
                eprintln!("meshctl: {error:#}");
                exit_code(&error)
            }
        };
        // A watch outlives a restart of the agent.
        // An order is given once.
        let repeats =
            !matches!(args.command, Command::Keys { command: Some(Keys::Rotate { .. }) } | Command::Nodes(_));
        match args.global.watch.filter(|_| repeats) {
            Some(interval) => tokio::time::sleep(interval).await,
            None => return code,
        }
        output::next_round();
    }
}

fn default_socket() -> PathBuf {
    let name = if nix::unistd::Uid::effective().is_root() {
        defaults::CONTROL_SOCKET
    } else {
        defaults::STATUS_SOCKET
    };
    Path::new(defaults::RUN_DIR).join(name)
}

fn exit_code(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<ClientError>() {
        Some(ClientError::NotThere { .. } | ClientError::Timeout(_) | ClientError::Broken(_)) => {
            EXIT_NOT_THERE
        }
        Some(ClientError::Permission(_)) => EXIT_PERMISSION,
        Some(ClientError::Refused { .. } | ClientError::Unexpected(_)) => EXIT_ANSWER,
        None => EXIT_TROUBLE,
    }
}

async fn once(client: &Client, global: &Global, command: &Command) -> anyhow::Result<u8> {
    let format = global.output;
    match command {
        Command::Status { check } => {
            let status: Status = client.get("/v1/status").await?;
            output::print(format, &status, render::status::table)?;
            return Ok(if *check && !healthy(&status) { EXIT_TROUBLE } else { 0 });
        }
        Command::Peers { verbose, names } => {
            let mut peers: Vec<PeerStatus> = client.get("/v1/peers").await?;
            peers.retain(|peer| names.is_empty() || names.contains(&peer.name));
            // What is dropped before it is known whose it is, only the device has.
            let devices = match (verbose, format) {
                (true, Format::Table) => client.get::<Status>("/v1/status").await?.devices,
                _ => Vec::new(),
            };
            output::print(format, &peers, |peers| {
                let table = render::peers::table(peers, *verbose);
                let more = [render::status::offloads(&devices), render::peers::drops(&devices, peers)];
                let more = more.into_iter().filter(|section| *verbose && !section.is_empty());
                std::iter::once(table).chain(more).collect::<Vec<_>>().join("\n\n")
            })?;
        }
        Command::Policy(Policy::List) => {
            let policies: Vec<PolicyStatus> = client.get("/v1/policies").await?;
            output::print(format, &policies, |policies| render::policies::table(policies))?;
        }
        Command::Keys { command: None | Some(Keys::Show) } => {
            let rotation: RotationStatus = client.get("/v1/keys").await?;
            output::print(format, &rotation, render::keys::table)?;
        }
        Command::Keys { command: Some(Keys::Rotate { all }) } => {
            let path = if *all { "/v1/keys/rotate-all" } else { "/v1/keys/rotate" };
            let ordered: Ordered = client.post(path).await?;
            output::print(format, &ordered, render::keys::ordered)?;
        }
        Command::Nodes(Nodes::Trust { name }) => {
            let trusted: Trusted = client.post(&format!("/v1/nodes/{name}/trust")).await?;
            output::print(format, &trusted, |trusted| {
                format!(
                    "announcements of node {} are believed here when signed with {}",
                    trusted.node, trusted.key
                )
            })?;
        }
        Command::Events { follow } => events(client, global, *follow).await?,
        Command::Dump => {
            let dump: serde_json::Value = client.get("/v1/dump").await?;
            output::print(format, &dump, |dump| format!("{dump:#}"))?;
        }
        Command::Sync => sync(client, global).await?,
        // Done before anybody is asked.
        Command::Install(_) => {}
    }
    Ok(0)
}

/// Everything is as it should be.
fn healthy(status: &Status) -> bool {
    status.issues.is_empty()
        && status.devices.iter().all(|device| device.state == "up")
        && status.peers.iter().all(|peer| peer.state != PeerState::Down)
        && status.reconcilers.iter().all(|reconciler| reconciler.state != "error")
}

async fn events(client: &Client, global: &Global, follow: bool) -> anyhow::Result<()> {
    let mut events: Vec<DenyEvent> = client.get("/v1/events").await?;
    output::print(global.output, &events, |events| render::events::table(events))?;
    if !follow {
        return Ok(());
    }
    loop {
        tokio::time::sleep(POLL).await;
        let newer: Vec<DenyEvent> = client.get("/v1/events").await?;
        let fresh = render::events::after(&events, &newer);
        if !fresh.is_empty() {
            output::print(global.output, &fresh, |fresh| render::events::lines(fresh))?;
        }
        events = newer;
    }
}

async fn sync(client: &Client, global: &Global) -> anyhow::Result<()> {
    let synced: Synced = client.post("/v1/sync").await?;
    let deadline = Instant::now() + global.timeout;
    loop {
        let status: Status = client.get("/v1/status").await?;
        if status.generation.enforced >= synced.generation {
            return output::print(global.output, &synced, |synced| {
                format!("generation {} is enforced", synced.generation)
            });
        }
        if Instant::now() >= deadline {
            let failing: Vec<String> = status
                .reconcilers
                .iter()
                .filter_map(|r| r.error.as_ref().map(|error| format!("{}: {error}", r.name)))
                .collect();
            anyhow::bail!(
                "generation {} is not enforced after {:?} (enforced: {}){}{}",
                synced.generation,
                global.timeout,
                status.generation.enforced,
                if failing.is_empty() { "" } else { ": " },
                failing.join("; ")
            );
        }
        tokio::time::sleep(POLL).await;
    }
}
