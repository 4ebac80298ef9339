//! `meshctl` asks the agent on this node: who talks to whom, and is it encrypted?

mod args;
mod client;
mod install;
mod output;
mod render;
mod run;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let args = args::Args::parse();
    if let args::Command::Install(install) = &args.command {
        return match install::run(install) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("meshctl: {error:#}");
                ExitCode::from(run::EXIT_TROUBLE)
            }
        };
    }
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("meshctl: {error}");
            return ExitCode::from(run::EXIT_TROUBLE);
        }
    };
    ExitCode::from(runtime.block_on(run::run(args)))
}
