//! Pure views of the model.

#[cfg(test)]
pub(crate) mod sample;
