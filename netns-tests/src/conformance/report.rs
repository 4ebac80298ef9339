//! What is said of a run.

use serde::Serialize;

/// One case's verdict.
#[derive(Debug, Clone, Serialize)]
pub struct Result {
    /// The file it is from.
    pub file: String,
    /// The case.
    pub case: String,
    /// `ambiguous` or `experimental`: reported apart.
    pub open: bool,
    /// Every wrong probe or other failure; none means it passed.
    pub wrong: Vec<String>,
    /// Probes made.
    pub probes: usize,
    /// Milliseconds.
    pub took_ms: u128,
}

/// A line for a case that has just ended, with each of its wrong probes below.
pub fn line(result: &Result) -> String {
    let word = match (result.wrong.is_empty(), result.open) {
        (true, false) => "ok",
        (false, false) => "FAILED",
        (true, true) => "agrees (open)",
        (false, true) => "differs (open)",
    };
    let mut text = format!("{word:<7} {} ({} probes, {} ms)", result.case, result.probes, result.took_ms);
    for wrong in &result.wrong {
        text += &format!("\n        {wrong}");
    }
    text
}

/// The closing lines: open cases apart, then `N passed, N failed`. True if nothing failed and something ran.
pub fn closing(results: &[Result]) -> (String, bool) {
    let count = |open: bool, passed: bool| {
        results.iter().filter(|r| r.open == open && r.wrong.is_empty() == passed).count()
    };
    let mut text = String::new();
    if results.iter().any(|result| result.open) {
        text += &format!(
            "ambiguous or experimental: {} agree, {} differ\n",
            count(true, true),
            count(true, false)
        );
    }
    text += &format!("{} passed, {} failed", count(false, true), count(false, false));
    (text, count(false, false) == 0 && !results.is_empty())
}
