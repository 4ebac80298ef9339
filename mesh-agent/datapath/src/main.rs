//! `mesh-datapath IFNAME`: one userspace WireGuard device, configured over its UAPI socket.

use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::sync::{Arc, mpsc};

use anyhow::Context as _;
use clap::Parser;
use mesh_datapath::engine::{Engine, Exit};
use mesh_datapath::process::{daemon, notify, privileges, signals};
use mesh_datapath::server::{self, Server};
use mesh_datapath::tun::{self, Tun};
use mesh_datapath::udp::Sockets;
use tracing_subscriber::EnvFilter;

/// A userspace WireGuard device. Configure it with wg(8).
///
/// Goes into the background once its socket, /var/run/wireguard/IFNAME.sock, answers. Ends on SIGTERM or SIGINT,
/// when the interface is deleted, and when the socket's file is removed.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Stays in the foreground
    #[arg(short, long)]
    foreground: bool,
    /// Leaves the interface in place at the end, so that its packets are dropped and take no other route
    #[arg(long)]
    persist: bool,
    /// The interface; made if there is none, taken over if its last owner is gone
    #[arg(value_name = "IFNAME")]
    interface: String,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    start_log();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Levels come from RUST_LOG, or from LOG_LEVEL as other userspace devices have it.
fn start_log() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| {
        EnvFilter::new(match std::env::var("LOG_LEVEL").as_deref() {
            Ok("verbose" | "debug") => "debug",
            Ok("error") => "error,boringtun=off",
            Ok("silent") => "off",
            // The core calls each tunnel that goes idle an error.
            _ => "info,boringtun=off",
        })
    });
    let ansi = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(ansi).with_writer(std::io::stderr).init();
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let name = &arguments.interface;
    tun::check_name(name)?;
    let path = mesh_uapi::client::socket_path(name);
    server::claim(&path)?;
    let tun = Tun::open(name)?;
    let prepared = Sockets::bind(0, 0).context("UDP sockets").and_then(|s| Ok((s, Server::bind(&path)?)));
    let (sockets, server) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => {
            leave(&tun, arguments.persist);
            return Err(error);
        }
    };
    let server = Arc::new(server);
    let port = sockets.port;
    let engine = Engine::new(tun, sockets).context("engine")?;

    let exit = (|| {
        let parent = match arguments.foreground {
            true => None,
            false => {
                let keep_output = ["LOG_LEVEL", "RUST_LOG"].iter().any(|v| std::env::var_os(v).is_some());
                Some(daemon::daemonize(keep_output).context("daemonise")?)
            }
        };
        privileges::drop_all_but_kept().map_err(anyhow::Error::msg)?;
        let (sender, exits) = mpsc::channel();
        signals::watch(sender.clone()).context("signals")?;
        engine.start(&sender).context("threads")?;
        server.start(&engine, &sender).context("threads")?;
        tracing::info!(
            "mesh-datapath {} on {name}, UDP port {port}, MTU {}",
            env!("CARGO_PKG_VERSION"),
            engine.device.mtu()
        );
        if let Some(parent) = parent {
            parent.ready().context("parent")?;
        }
        if let Some(socket) = std::env::var_os("NOTIFY_SOCKET")
            && let Err(e) = notify::ready(&socket)
        {
            tracing::warn!("NOTIFY_SOCKET {}: {e}", socket.display());
        }
        exits.recv().context("every thread is gone")
    })();
    server.remove();
    let exit = exit.inspect_err(|_| leave(engine.tun(), arguments.persist))?;
    if let Exit::Failed(why) = exit {
        // As after a crash, the interface stays: its packets must not take another road.
        anyhow::bail!("{name}: {why}");
    }
    tracing::info!("{name}: ends: {exit:?}");
    leave(engine.tun(), arguments.persist);
    Ok(())
}

/// A clean end takes the interface along.
fn leave(tun: &Tun, persist: bool) {
    if !persist && let Err(e) = tun.set_persistent(false) {
        tracing::debug!("{}: {e}", tun.name());
    }
}
