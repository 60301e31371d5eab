//! One folder a runtime, all of one shape.

pub mod go;
