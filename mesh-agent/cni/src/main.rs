//! The CNI plugin (<https://www.cni.dev/docs/spec/>, 1.1.0): one question to mesh-agent, one answer to the
//! container runtime. It holds no state and changes nothing itself. With arguments it is its own installer.

mod config;
mod environment;
mod error;
mod exchange;
mod installer;
mod plugin;
mod result;

use std::io::{Read as _, Write as _};
use std::process::ExitCode;

/// No network configuration comes near this.
const MAX_STDIN: u64 = 4 << 20;

fn main() -> ExitCode {
    // Runtimes give none (specification section 2).
    if std::env::args_os().len() > 1 {
        return installer::main();
    }
    let mut input = Vec::new();
    let read = std::io::stdin().lock().take(MAX_STDIN + 1).read_to_end(&mut input);
    let outcome = match read {
        Ok(_) if input.len() as u64 > MAX_STDIN => Err(error::CniError::new(
            error::DECODE,
            format!("standard input is longer than {MAX_STDIN} bytes"),
        )),
        Ok(_) => plugin::call(&environment::Environment::from_process(), &input),
        Err(problem) => Err(error::CniError::new(error::IO, format!("standard input: {problem}"))),
    };
    let (text, code) = match outcome {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(answer)) => (answer.to_string(), ExitCode::SUCCESS),
        Err(problem) => (problem.to_json(&config::version_of(&input)).to_string(), ExitCode::FAILURE),
    };
    match writeln!(std::io::stdout().lock(), "{text}") {
        Ok(()) => code,
        Err(_) => ExitCode::FAILURE,
    }
}
